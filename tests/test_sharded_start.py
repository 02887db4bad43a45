"""Modules sharded over two processes on the meta device start as whole ones do."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import draws
from legato import GILR, GILRLSTM, LMU, LRU, Highway, RecurrentLMU
from legato.layers import LegendreMemory
from legato.models import Embedding, LanguageModel

VECTORS = torch.arange(1.0, 37.0).view(9, 4)
MODULES = {
    "GILR": lambda: GILR(20, 30, forget_bias=2.0),
    "GILRLSTM": lambda: GILRLSTM(20, 30, forget_bias=2.0),
    "LRU": lambda: LRU(20, 30),
    "Highway": lambda: Highway(30),
    "LMU": lambda: LMU(20, 30, memory_size=3, order=3, theta=[6.0, 7.0, 8.0], trainable_theta=True),
    "LegendreMemory": lambda: LegendreMemory(3, 3, [6.0, 7.0, 8.0], trainable_theta=True),
    "RecurrentLMU": lambda: RecurrentLMU(20, 30, order=3, theta=6.0, hidden_cell="lstm"),
    "Embedding": lambda: Embedding(30, 20),
    "vectors": lambda: Embedding(9, 4, vectors=VECTORS),
    "language model": lambda: LanguageModel(Embedding(30, 20), lambda size: GILR(size, size), num_layers=1),
}


def start(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    draws.seed(rank)  # each process draws numbers of its own
    found = {}
    for name, make in MODULES.items():
        with torch.device("meta"):
            module = make()
        fully_shard(module)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(torch.nan)
        module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        found[name] = {key: parameter.full_tensor() for key, parameter in module.named_parameters()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(start, (str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for name, parameters in first.items():
        for key, value in parameters.items():
            assert torch.equal(value, second[name][key]), (name, key)
    return first


@pytest.mark.parametrize("name", MODULES)
def test_every_block_of_a_sharded_module_is_set(found, name):
    draws.seed(0)
    expected = dict(MODULES[name]().named_parameters())
    draws.seed(1)
    others = dict(MODULES[name]().named_parameters())
    assert found[name].keys() == expected.keys()
    for key, value in found[name].items():
        fixed = expected[key] == others[key]
        assert torch.equal(value[fixed], expected[key][fixed]), key
        drawn = value[~fixed]
        assert drawn.isfinite().all(), key
        assert drawn.unique().numel() >= drawn.numel() / 2, key  # one block set for another would repeat its numbers
