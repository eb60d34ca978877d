import mmap
import sys

import torch
from torch import nn

from pliant.measure import growth_of, resident_bytes, tensor_bytes
from pliant.measure.memory import peak_resident_bytes, run_child


class Coded(nn.Module):
    class Code:
        def __init__(self, *tensors):
            self._tensors = tensors

        def tensors(self):
            return {str(i): t for i, t in enumerate(self._tensors)}

    def __init__(self):
        super().__init__()
        shared = torch.zeros(10, dtype=torch.uint8)
        self.code = self.Code(shared, torch.zeros(3, dtype=torch.float16))
        self.again = self.Code(shared)


def test_tensor_bytes_counts_each_storage_once(llama):
    parameters = sum(p.numel() for p in llama.parameters())  # tied head once
    assert tensor_bytes(llama) == 4 * parameters
    assert tensor_bytes(Coded()) == 10 + 6


def test_tensor_bytes_leaves_out_what_is_not_stored():
    module = nn.Module()
    module.register_buffer("stored", torch.zeros(5))
    module.register_buffer("made", torch.zeros(7), persistent=False)
    module.weight = nn.Parameter(torch.empty(100, device="meta"))
    assert tensor_bytes(module) == 20


def test_growth_sees_a_peak_that_is_over():
    def work():
        # Pages of its own: an allocator may have as much free from the tests before.
        with mmap.mmap(-1, 64 << 20) as block:
            for page in range(0, 64 << 20, mmap.PAGESIZE):
                block[page] = 1

    growth = growth_of(work)
    assert 60 << 20 < growth.bytes < 90 << 20
    assert growth.peak - growth.after > 50 << 20
    assert peak_resident_bytes() >= resident_bytes()


def test_a_childs_peak_is_its_own():
    script = "import time; block = b'x' * (50 << 20); time.sleep(0.2); print(len(block))"
    child = run_child([sys.executable, "-c", script])
    assert child.returncode == 0
    assert child.stdout.strip() == str(50 << 20)
    assert 50 << 20 < child.peak < 90 << 20
