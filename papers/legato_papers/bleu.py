"""BLEU by sacrebleu, from counts that add up: over batches and devices as over the whole text.

``bleu_counts`` of every batch, their sum, then ``bleu``. The tokenised BLEU of older papers is ``tokenize="none"`` on
text that is tokenised already; ``detokenised`` turns such text into what a reader would see.
"""

import html
import re
from collections.abc import Sequence

import torch

from legato._shapes import Tensor

#: Numbers that ``bleu_counts`` gives: n-grams of 1 to 4 words found and written, words written, words wanted.
COUNTS = 10


def bleu_counts(translations: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Tensor:
    """What BLEU follows from, (10,), float64: to be added over all sentences.

    Args:
        translations: a text a sentence.
        references: as many; one each.
        tokenize: "13a" of sacrebleu for plain text, "none" for words between spaces.
    """
    if len(translations) != len(references):
        raise ValueError(f"expected a reference for each translation, got {len(translations)} and {len(references)}")
    if not references:
        return torch.zeros(COUNTS, dtype=torch.float64)
    score = _metric(tokenize).corpus_score(translations, [references])
    return torch.tensor([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=torch.float64)


def bleu(counts: Tensor, tokenize: str = "13a") -> float:
    """BLEU, 0 to 100, of what these counts are the sum of."""
    found, written, (length, wanted) = (part.long().tolist() for part in counts.split([4, 4, 2]))
    metric = _metric(tokenize)
    return metric.compute_bleu(
        found, written, length, wanted, smooth_method=metric.smooth_method, smooth_value=metric.smooth_value
    ).score


def signature(tokenize: str = "13a") -> str:
    """What sacrebleu calls this way of counting, to be quoted with every figure."""
    metric = _metric(tokenize)
    metric.corpus_score(["a"], [["a"]])  # the signature names the number of references
    return metric.get_signature().format()


def detokenised(text: str) -> str:
    """Plain text of words between spaces as Moses' tokenizer writes them: marks joined to their words, &quot; undone.

    Example:
        >>> print(detokenised("It read , &quot; When you haven &apos;t eaten . &quot;"))
        It read, "When you haven't eaten."
    """
    text = html.unescape(text)
    text = re.sub(r" (?='(?:s|t|m|d|re|ve|ll)\b)", "", text)
    text = re.sub(r'(^|(?<= ))" (.*?) "(?= |$)', r'"\2"', text)  # an opening mark, then a closing one
    text = re.sub(r" (?=[,.;:!?%)\]}])", "", text)
    return re.sub(r"(?<=[(\[{]) ", "", text)


def _metric(tokenize: str):
    from sacrebleu.metrics.bleu import BLEU

    # multi-bleu.perl, behind the older papers' figures, does not smooth; sacrebleu's own default is "exp".
    smooth = "none" if tokenize == "none" else "exp"
    return BLEU(tokenize=tokenize, smooth_method=smooth, force=True)
