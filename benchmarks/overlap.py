"""Does a warpgroup's arithmetic run beside another's products, on Hopper's tensor cores?

    python benchmarks/overlap.py

One warpgroup multiplies (m64n256k16, operands in shared memory), another calculates; cycles of each alone and of both
together. An activation in the epilogue of a product is worth its place only as far as the last two are less than the
sum of the first two.
"""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table

from moelab.device import resolve_device
from moelab.experts import hopper, nvrtc

SHARED, THREADS, BLOCKS_OF_PRODUCTS = 112 * 1024, 256, 400
KINDS = {  # what the second warpgroup does: a macro's number, and how often
    "FFMA, independent": (0, 150),
    "2^x": (1, 80),
    "GELU, 64 at once": (2, 120),
    "GELU, 4 at once": (3, 120),
    "GELU and its slope, 64 at once": (4, 60),
    "bf16x2 FMA": (5, 300),
}

SOURCE = r"""
constexpr int BOX = 8192, STAGE = 6 * BOX;

extern "C" __global__ void __launch_bounds__(256, 1)
overlap(long long* cycles, float* out, long long products, long long rounds) {
    unsigned* words = reinterpret_cast<unsigned*>(dynamic);
    for (int i = threadIdx.x; i < 2 * STAGE / 4; i += 256)
        words[i] = 0x3c003c00u + (i * 2654435761u >> 20 & 0x007f007f);
    before_async();
    __syncthreads();
    const long long start = clock64();
    float sum = 0;
    if (threadIdx.x < 128) {
        float acc[2][64] = {};
        for (int n = 0; n < products; ++n) {
            const Address left = shared_base() + n % 2 * STAGE, right = left + 2 * BOX;
            hold(acc[0]);
            hold(acc[1]);
            products_begin();
#pragma unroll
            for (int i = 0; i < 128; i += 32)
                multiply<0, 0>(acc, descriptor(left + i, BOX), descriptor(right + i, BOX), 1);
            products_issued();
            products_wait<1>();
        }
        products_wait<0>();
        hold(acc[0]);
        hold(acc[1]);
        for (int i = 0; i < 64; ++i) sum += acc[0][i] + acc[1][i];
    } else {
        float v[64];
        unsigned pair[32];
        for (int i = 0; i < 64; ++i) v[i] = threadIdx.x * 0.01f + i * 0.1f - 2.0f;
        for (int i = 0; i < 32; ++i) pair[i] = 0x3c003c01u + threadIdx.x * i;
        for (int n = 0; n < rounds; ++n) {
            if (KIND == 0) {
#pragma unroll
                for (int r = 0; r < 16; ++r)
#pragma unroll
                    for (int i = 0; i < 64; ++i) v[i] = v[i] * 0.999f + 0.001f;
            } else if (KIND == 1) {
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int i = 0; i < 64; ++i) v[i] = power_of_2(v[i]);
            } else if (KIND == 2) {
#pragma unroll
                for (int i = 0; i < 64; ++i) v[i] = curve(v[i]).height;
            } else if (KIND == 3) {  // four wait for the four before them
#pragma unroll
                for (int i = 0; i < 64; ++i) v[i] = curve(v[(i + 60) % 64] * 1e-30f + v[i]).height;
            } else if (KIND == 4) {
#pragma unroll
                for (int i = 0; i < 64; ++i) {
                    const Curve at = curve(v[i]);
                    v[i] = at.height * 0.3f + at.slope;
                }
            } else {
#pragma unroll
                for (int r = 0; r < 16; ++r)
#pragma unroll
                    for (int i = 0; i < 32; ++i)
                        asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;"
                                     : "+r"(pair[i]) : "r"(pair[(i + 5) % 32]), "r"(pair[(i + 11) % 32]));
            }
        }
        for (int i = 0; i < 64; ++i) sum += v[i] + pair[i % 32];
    }
    out[blockIdx.x * 256 + threadIdx.x] = sum;
    if (threadIdx.x % 128 == 0) cycles[blockIdx.x * 2 + threadIdx.x / 128] = clock64() - start;
}
"""


class Kind(nvrtc.Source):
    """The kernel above, for one of the kinds."""

    def __init__(self, kind: int) -> None:
        macros = ("KIND", kind), ("ACTIVATION", 0), ("BFLOAT16", 1)
        super().__init__("overlap", *macros, headers=("ptx.cuh", "curve.cuh", "hopper.cuh"), feature="a", blocks=1)

    def text(self) -> str:
        return "\n".join((nvrtc.FOLDER / name).read_text() for name in self.headers) + SOURCE


def main() -> None:
    device = resolve_device("auto")
    reason = "needs a GPU" if device.type != "cuda" else hopper.unusable(device)
    if reason is not None:
        raise SystemExit(f"overlap.py: device = {device.type}: {reason}")
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    cycles = torch.zeros(blocks, 2, dtype=torch.int64, device=device)
    out = torch.zeros(blocks, THREADS, device=device)
    table = Table("beside the products", "products alone", "alone", "products together", "together", title="cycles")
    for name, (kind, rounds) in KINDS.items():
        source, found = Kind(kind), []
        for products, times in ((BLOCKS_OF_PRODUCTS, 0), (0, rounds), (BLOCKS_OF_PRODUCTS, rounds)):
            for _ in range(2):  # the first one compiles
                with nvrtc.launches(device) as launch:
                    arguments = cycles.data_ptr(), out.data_ptr(), products, times
                    launch(source, "overlap", (blocks, 1), (THREADS, 1), *arguments, shared=SHARED)
            found.append([statistics.median(column) for column in cycles.T.tolist()])
        alone, other, both = found
        table.add_row(name, *(f"{n:,.0f}" for n in (alone[0], other[1], *both)))
    Console().print(table)


if __name__ == "__main__":
    main()
