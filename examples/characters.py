"""A character language model: trained in parallel over time, then generates in constant memory.

    python examples/characters.py [FILE]

FILE is any text file. The default is the text of this file, which is too short for a good model.
"""

import math
import sys
from pathlib import Path

import torch

from legato import LMU
from legato.models import Embedding, LanguageModel

LENGTH, BATCH, UPDATES = 128, 16, 150


def main(path: Path, updates: int = UPDATES) -> str:
    torch.manual_seed(0)
    text = path.read_text(encoding="utf-8", errors="replace")
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])

    def memory(size: int) -> LMU:  # a window of ten characters in each of the three blocks
        return LMU(size, size, memory_size=size // 2, order=5, theta=10)

    model = LanguageModel(
        Embedding(len(letters), 32, padding_idx=None), memory, num_layers=3, hidden_size=64, highways=1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for update in range(updates):
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        window = ids[starts + torch.arange(LENGTH + 1)]
        loss, _ = model.loss(window[:, :-1], window[:, 1:])  # all time steps in parallel
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 25 == 0:
            print(f"update {update:4}: {loss.item() / math.log(2):.2f} bits per character")

    prompt = ids[:40]
    drawn = model.generate(prompt[None], 200, temperature=0.5)  # one step at a time
    return "".join(letters[i] for i in [*prompt.tolist(), *drawn[0].tolist()])


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else __file__)))
