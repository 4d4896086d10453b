"""The kernels of the backend `triton`.

Rows are routed slots sorted by expert; those of one expert lie side by side, dropped ones last. A program of a product
computes a tile of rows of one expert. How many tiles an expert has is known on the device alone: the grid is as large
as it can be, each program finds its expert in the offsets, and programs past the last tile return at once.

Every sum runs in a fixed order. Products accumulate in fp32; `PRECISION` "ieee" keeps fp32 inputs whole.

Places in a tensor are 64-bit where they depend on a row and 32-bit within a tile. Rows past the end are read from the
last one inside, and never written: a load without a mask costs fewer instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sorting


@triton.jit
def _bins(indices, first, slots, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, STEP: tl.constexpr):
    """One-hot (STEP, EXPERTS_2) int32 of the experts of `STEP` slots; a dropped slot is in bin EXPERTS."""
    s = first + tl.arange(0, STEP)
    expert = tl.load(indices + s, mask=s < slots, other=0).to(tl.int64)  # of any integer type
    expert = tl.where((expert < 0) | (expert >= EXPERTS), EXPERTS, expert).to(tl.int32)
    expert = tl.where(s < slots, expert, EXPERTS_2)
    return expert, (expert[:, None] == tl.arange(0, EXPERTS_2)[None, :]).to(tl.int32)


@triton.jit
def count(indices, counts, slots, span, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, STEP: tl.constexpr):
    """counts[program, expert] = how many of the program's `span` slots went to the expert; bin EXPERTS: dropped."""
    block = tl.program_id(0)
    begin, end = block * span, tl.minimum(block * span + span, slots)
    total = tl.zeros((EXPERTS_2,), tl.int32)
    for first in range(begin, end, STEP):
        _, chosen = _bins(indices, first, end, EXPERTS, EXPERTS_2, STEP)
        total += tl.sum(chosen, 0)
    tl.store(counts + block * EXPERTS_2 + tl.arange(0, EXPERTS_2), total)


@triton.jit
def place(
    indices, counts, slot_of_row, row_of_slot, offsets, slots, span, blocks,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The stable counting sort's second half: each slot's row, and each row's slot; and where experts' rows end."""
    block = tl.program_id(0)
    b, e = tl.arange(0, BLOCKS), tl.arange(0, EXPERTS_2)
    table = tl.load(counts + b[:, None] * EXPERTS_2 + e[None, :], mask=(b < blocks)[:, None], other=0)
    total = tl.sum(table, 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets + e, ends, mask=e < EXPERTS)
    before = ends - total + tl.sum(tl.where((b < block)[:, None], table, 0), 0)
    begin, end = block * span, tl.minimum(block * span + span, slots)
    for first in range(begin, end, STEP):
        _, chosen = _bins(indices, first, end, EXPERTS, EXPERTS_2, STEP)
        rank = tl.cumsum(chosen, 0) + before[None, :] - 1
        row = tl.sum(tl.where(chosen != 0, rank, 0), 1)
        s = first + tl.arange(0, STEP)
        tl.store(row_of_slot + s, row, mask=s < end)
        tl.store(slot_of_row + row, s, mask=s < end)
        before += tl.sum(chosen, 0)


# Activations


@triton.jit
def _gelu(z, EXACT: tl.constexpr):
    """z·Φ(z) and its derivative, Φ the normal distribution's.

    EXACT: by erf. Otherwise log2 Φ(−|z|) is a polynomial of degree 5 in |z|, fitted for the error of both results: at
    most 1.1e-6 in z·Φ(z) and 2.4e-5 in its derivative, and 5e-5 of Φ(−|z|) itself for |z| ≤ 3. It falls for ever, so
    that no finite argument is too large, and costs one exponential and 8 other instructions.
    """
    if EXACT:
        phi = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476))
        a = z * phi
    else:
        m = tl.abs(z)
        p = -0.00043716971413232386 * m + 0.006832347717136145
        p = p * m - 0.05121857672929764
        p = p * m - 0.460610568523407
        p = p * m - 1.1505370140075684
        tail = tl.math.exp2(p * m - 1.000066876411438)
        a = tl.maximum(z, 0.0) - m * tail
        phi = tl.where(z > 0, 1 - tail, tail)
    density = tl.math.exp2(z * z * -0.7213475204444817 - 1.3257480647361592)
    return a, phi + z * density


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z) and act'(z) in fp32; of swiglu those of the gate, silu."""
    if ACTIVATION == "gelu":
        a, d = _gelu(z, EXACT)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        a = z * s
        d = s + a * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACTIVATION == "relu2":
        positive = tl.where(z != z, z, tl.maximum(z, 0.0))
        a = positive * positive
        d = 2 * positive
    else:
        s = tl.sigmoid(z)
        a = z * s
        d = s * (1 + z * (1 - s))
    return a, d


# Products


@triton.jit
def _tile(offsets, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BLOCK: tl.constexpr, tile):
    """Of tile number `tile`: its expert (EXPERTS past the last tile), first row, and the end of the expert's rows."""
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = tl.where(e < EXPERTS, (ends - starts + BLOCK - 1) // BLOCK, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum(((last <= tile) & (e < EXPERTS)).to(tl.int32), 0)
    here = e == expert
    first_tile = tl.sum(tl.where(here, last - tiles, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0) + (tile - first_tile) * BLOCK
    return expert, start, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, CAST: tl.constexpr):
    if CAST:  # the interpreter multiplies bf16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _right(places, within, columns, EVEN: tl.constexpr, WHOLE: tl.constexpr):
    if EVEN and WHOLE:
        m = tl.load(places)
    elif WHOLE:
        m = tl.load(places, mask=within[:, None], other=0.0)
    else:
        m = tl.load(places, mask=within[:, None] & columns[None, :], other=0.0)
    return m


@triton.jit
def _read(places, mask, DIRECT: tl.constexpr):
    """Values at (rows, columns) as fp32, in the layout of the arithmetic that they go into.

    A plain load has a layout of its own, and what is computed from it in both layouts would be computed twice: an
    activation costs more than the load. DIRECT: all places are valid, values have 16 bits, and the layout holds columns
    2i and 2i + 1 side by side in a thread, as the tensor cores' of compute capability 8 and 9 do (PTX ISA, "Matrix
    multiply-accumulate", fragments of the accumulator).
    """
    if DIRECT:
        bits = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l,l", [places.to(tl.int64)], dtype=tl.int16, is_pure=True, pack=2
        )
        v = bits.to(places.dtype.element_ty, bitcast=True)
    else:
        v = tl.load(places, mask=mask, other=0.0)
    return v.to(tl.float32)


@triton.jit
def _slope(
    acc, r, o, z, out, h, weight, bias_parts, rows, outside,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """The epilogue "slope" of `product` for some columns of its tile; returns Σ over them of dL/dh · act(z)."""
    dtype: tl.constexpr = out.dtype.element_ty
    inside_columns = o < outside
    mask = (r < rows)[:, None] & inside_columns[None, :]
    held = tl.minimum(r, rows - 1)[:, None]
    spot = r[:, None] * outside + o[None, :]
    weight = weight[:, None]
    if ACTIVATION == "swiglu":
        g = _read(z + held * (2 * outside) + o[None, :], mask, DIRECT)
        v = _read(z + held * (2 * outside) + outside + o[None, :], mask, DIRECT)
        gate, slope = _activated(g, "silu", EXACT)
        active = gate * v
        twice = r[:, None] * (2 * outside) + o[None, :]
        d_gate, d_z = weight * acc * v * slope, weight * acc * gate
        tl.store(out + twice, d_gate.to(dtype), mask=mask)
        tl.store(out + twice + outside, d_z.to(dtype), mask=mask)
        if HAS_BIAS:
            tl.store(bias_parts + o, tl.sum(tl.where(mask, d_gate, 0.0), 0), mask=inside_columns)
            tl.store(bias_parts + outside + o, tl.sum(tl.where(mask, d_z, 0.0), 0), mask=inside_columns)
    else:
        g = _read(z + held * outside + o[None, :], mask, DIRECT)
        active, slope = _activated(g, ACTIVATION, EXACT)
        d_z = weight * acc * slope
        tl.store(out + spot, d_z.to(dtype), mask=mask)
        if HAS_BIAS:
            tl.store(bias_parts + o, tl.sum(tl.where(mask, d_z, 0.0), 0), mask=inside_columns)
    # The comparison ties h to the product's layout, in which act(z) is there already.
    tl.store(h + spot, tl.where(acc == acc, weight * active, acc).to(dtype), mask=mask)
    if not WHOLE:
        acc = tl.where(inside_columns[None, :], acc, 0.0)
    return tl.sum(acc * active, 1)


@triton.jit
def product(
    a, slot_of_row, w, bias, out, offsets, z, h, weights, partial, bias_parts,
    inside, outside, tiles, a_map, w_map,
    GATHER: tl.constexpr, ACROSS: tl.constexpr, TOP_K: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, CAST: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, DIRECT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Rows (N, inside) by w[e] (outside, inside), or ACROSS (inside, outside), → (N, outside), a tile a program.

    GATHER: row r of the left operand is a[slot_of_row[r] // TOP_K].
    a_map, w_map: where not None, descriptors by which the tensor memory accelerator loads tiles of an operand.
    GROUP: so many tiles of rows go down a column of tiles before the next column, for the cache.
    EPILOGUE "": out = product + bias. "act": z = product + bias, h = act(z); with swiglu, outside is F and the value's
    rows of w follow F rows below the gate's. "slope": the product is dL/dh of an unweighted row; out = weight · dL/dh ·
    act'(z), h = weight · act(z), and partial[r, column block] = Σ dL/dh · act(z), whose sum is dL/dweight; HAS_BIAS:
    bias_parts[tile] = Σ over the tile's rows of out, whose sum over an expert's tiles is dL/dbias.
    """
    columns = tl.cdiv(outside, COLUMNS)
    group = tl.program_id(0) // (GROUP * columns)
    within_group = tl.program_id(0) % (GROUP * columns)
    high = tl.minimum(GROUP, tiles - group * GROUP)
    tile, column = group * GROUP + within_group % high, within_group // high
    expert, start, end = _tile(offsets, EXPERTS, EXPERTS_2, ROWS, tile)
    if expert >= EXPERTS:
        return
    r, c, i = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    inside_rows = r < end - start
    o = column * COLUMNS + c
    inside_columns = o < outside
    row = tl.minimum(start + r, end - 1)
    if GATHER:
        slot = tl.load(slot_of_row + row)
        left = a + (slot // TOP_K).to(tl.int64)[:, None] * inside + i[None, :]
    else:
        left = a + row.to(tl.int64)[:, None] * inside + i[None, :]
    gated: tl.constexpr = (EPILOGUE == "act") & (ACTIVATION == "swiglu")
    wide: tl.constexpr = 2 if gated else 1
    right = w + expert.to(tl.int64) * inside * outside * wide
    right += i[:, None] * outside + o[None, :] if ACROSS else o[None, :] * inside + i[:, None]
    first = expert * inside if ACROSS else expert * outside * wide + column * COLUMNS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    value = acc
    for k in range(0, inside, DEPTH):
        if a_map is None:
            x = tl.load(left) if EVEN else tl.load(left, mask=(i < inside - k)[None, :], other=0.0)
        else:
            x = a_map.load([start, k])
        if w_map is None:
            m = _right(right, i < inside - k, inside_columns, EVEN, WHOLE)
        else:
            m = w_map.load([first + k, column * COLUMNS]) if ACROSS else w_map.load([first, k]).T
        acc = _dot(x, m, acc, PRECISION, CAST)
        if gated:
            if w_map is None:
                m = _right(right + outside * inside, i < inside - k, inside_columns, EVEN, WHOLE)
            else:
                m = w_map.load([first + outside, k]).T
            value = _dot(x, m, value, PRECISION, CAST)
        left += DEPTH
        right += DEPTH * outside if ACROSS else DEPTH
    mask = inside_rows[:, None] & inside_columns[None, :]
    begin = start.to(tl.int64) * outside
    spot = r[:, None] * outside + o[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if EPILOGUE == "act":
        if HAS_BIAS:
            bias += expert * outside * wide + o
            acc += tl.load(bias, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
            if gated:
                value += tl.load(bias + outside, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        # The activation is of what is stored: the backward pass sees no other.
        if gated:
            twice = z + 2 * begin + r[:, None] * (2 * outside) + o[None, :]
            g, v = acc.to(dtype), value.to(dtype)
            tl.store(twice, g, mask=mask)
            tl.store(twice + outside, v, mask=mask)
            active, _ = _activated(g.to(tl.float32), "silu", EXACT)
            tl.store(h + begin + spot, (active * v.to(tl.float32)).to(dtype), mask=mask)
        else:
            g = acc.to(dtype)
            tl.store(z + begin + spot, g, mask=mask)
            active, _ = _activated(g.to(tl.float32), ACTIVATION, EXACT)
            tl.store(h + begin + spot, active.to(dtype), mask=mask)
    elif EPILOGUE == "slope":
        weight = tl.load(weights + tl.load(slot_of_row + row))
        inner: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
        z += begin * inner
        out += begin * inner
        h += begin
        bias_parts += tile.to(tl.int64) * outside * inner
        rows_left = end - start
        if HALVES:  # fewer values alive at once
            half: tl.constexpr = COLUMNS // 2
            acc, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, half)), (0, 2, 1)))
            o = column * COLUMNS + tl.arange(0, half)
        share = _slope(
            acc, r, o, z, out, h, weight, bias_parts, rows_left, outside, ACTIVATION, HAS_BIAS, EXACT, WHOLE, DIRECT
        )
        if HALVES:
            share += _slope(
                second, r, o + half, z, out, h, weight, bias_parts, rows_left, outside, ACTIVATION, HAS_BIAS, EXACT,
                WHOLE, DIRECT,
            )  # fmt: skip
        tl.store(partial + (start + r).to(tl.int64) * columns + column, share, mask=inside_rows)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + expert * outside + o, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        tl.store(out + begin + spot, acc.to(dtype), mask=mask)


# Sums over rows


@triton.jit
def _chunk(offsets, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, longest, chunk):
    """`_tile` for chunks of up to `longest` rows, and its number among those of experts with several, or −1."""
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    chunks = tl.where(e < EXPERTS, (ends - starts + longest - 1) // longest, 0)
    last = tl.cumsum(chunks, 0)
    several = tl.where(chunks > 1, chunks, 0)
    parts = tl.cumsum(several, 0) - several
    expert = tl.sum(((last <= chunk) & (e < EXPERTS)).to(tl.int32), 0)
    here = e == expert
    within = chunk - tl.sum(tl.where(here, last - chunks, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0) + within * longest
    end = tl.minimum(start + longest, tl.sum(tl.where(here, ends, 0), 0))
    part = tl.sum(tl.where(here, tl.where(chunks > 1, parts + within, -1), 0), 0)
    return expert, start, end, part


@triton.jit
def _rows_product(
    dy, x, slot_of_row, first, end, o, i, outside, inside, acc, dy_map, x_map, o_first, i_first,
    GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc + Σ over DEPTH rows of dy[row]ᵀ x[row]; FULL: all of them are the expert's."""
    r = first + tl.arange(0, DEPTH)
    there = r < end
    row = r.to(tl.int64)
    token = row
    if GATHER_DY or GATHER_X:
        slot = tl.load(slot_of_row + r) if FULL else tl.load(slot_of_row + r, mask=there, other=0)
        token = (slot // TOP_K).to(tl.int64)
    left = dy + (token if GATHER_DY else row)[None, :] * outside + o[:, None]
    right = x + (token if GATHER_X else row)[:, None] * inside + i[None, :]
    if FULL and dy_map is not None:
        d = dy_map.load([first, o_first]).T
    elif FULL and WHOLE:
        d = tl.load(left)
    else:
        d = tl.load(left, mask=there[None, :] & (o < outside)[:, None], other=0.0)
    if FULL and x_map is not None:
        v = x_map.load([first, i_first])
    elif FULL and WHOLE:
        v = tl.load(right)
    else:
        v = tl.load(right, mask=there[:, None] & (i < inside)[None, :], other=0.0)
    return _dot(d, v, acc, PRECISION, CAST)


@triton.jit
def weight_gradient(
    dy, x, slot_of_row, offsets, dw, parts, outside, inside, longest, dy_map, x_map,
    GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dw[e] (outside, inside) = Σ over an expert's rows of dy[row]ᵀ x[row].

    A program sums over a chunk of rows for one tile of a matrix. The only chunk of an expert goes to dw; of several
    each goes to `parts` (chunk, outside, inside) in fp32, and `sum_parts` adds them. A gathered operand is of tokens.
    dy_map, x_map: see `product`. Rows past the chunk's end are another's, and may be NaN: they are masked at the end.
    """
    expert, start, end, part = _chunk(offsets, EXPERTS, EXPERTS_2, longest, tl.program_id(1))
    if expert >= EXPERTS:
        return
    across = tl.cdiv(inside, COLUMNS)
    o_first, i_first = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    o, i = o_first + tl.arange(0, ROWS), i_first + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    rest = end - (end - start) % DEPTH
    for first in range(start, rest, DEPTH):
        acc = _rows_product(
            dy, x, slot_of_row, first, end, o, i, outside, inside, acc, dy_map, x_map, o_first, i_first,
            GATHER_DY, GATHER_X, TOP_K, PRECISION, CAST, WHOLE, True, DEPTH,
        )  # fmt: skip
    if rest < end:
        acc = _rows_product(
            dy, x, slot_of_row, rest, end, o, i, outside, inside, acc, dy_map, x_map, o_first, i_first,
            GATHER_DY, GATHER_X, TOP_K, PRECISION, CAST, WHOLE, False, DEPTH,
        )  # fmt: skip
    mask = (o < outside)[:, None] & (i < inside)[None, :]
    spot = o[:, None] * inside + i[None, :]
    if part < 0:
        tl.store(dw + expert.to(tl.int64) * outside * inside + spot, acc.to(dw.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + part.to(tl.int64) * outside * inside + spot, acc, mask=mask)


@triton.jit
def sum_parts(
    parts, offsets, dw, size, longest, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What `weight_gradient` left in parts, summed in their order into dw; zeros for an expert without rows."""
    expert = tl.program_id(1)
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    chunks = tl.where(e < EXPERTS, (ends - starts + longest - 1) // longest, 0)
    several = tl.where(chunks > 1, chunks, 0)
    count = tl.sum(tl.where(e == expert, chunks, 0), 0)
    if count == 1:
        return
    first = tl.sum(tl.where(e < expert, several, 0), 0)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    place = parts + first.to(tl.int64) * size + s
    for _ in range(count):
        acc += tl.load(place, mask=s < size, other=0.0)
        place += size
    tl.store(dw + expert.to(tl.int64) * size + s, acc.to(dw.dtype.element_ty), mask=s < size)


@triton.jit
def bias_parts(
    dy, slot_of_row, weights, offsets, parts, width,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, LONGEST: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[chunk] (width) = Σ over a chunk of an expert's rows of weight · dy[token]."""
    chunk = tl.program_id(1)
    expert, start, end = _tile(offsets, EXPERTS, EXPERTS_2, LONGEST, chunk)
    if expert >= EXPERTS:
        return
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for first in range(start, tl.minimum(start + LONGEST, end), STEP):
        r = first + tl.arange(0, STEP)
        slot = tl.load(slot_of_row + r, mask=r < end, other=0)
        weight = tl.load(weights + slot, mask=r < end, other=0.0)
        token = (slot // TOP_K).to(tl.int64)
        d = tl.load(dy + token[:, None] * width + c[None, :], mask=(r < end)[:, None] & (c < width)[None, :], other=0.0)
        acc += tl.sum(d.to(tl.float32) * weight[:, None], 0)
    tl.store(parts + chunk.to(tl.int64) * width + c, acc, mask=c < width)


@triton.jit
def sum_bias_parts(
    parts, offsets, db, width, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, LONGEST: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """db[e] (width) = Σ of the parts of an expert's chunks of LONGEST rows, in their order."""
    expert = tl.program_id(1)
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    chunks = tl.where(e < EXPERTS, (ends - starts + LONGEST - 1) // LONGEST, 0)
    begin = tl.sum(tl.where(e < expert, chunks, 0), 0)
    end = begin + tl.sum(tl.where(e == expert, chunks, 0), 0)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, STEP):
        p = first + tl.arange(0, STEP)
        mask = (p < end)[:, None] & (c < width)[None, :]
        acc += tl.sum(tl.load(parts + p.to(tl.int64)[:, None] * width + c[None, :], mask=mask, other=0.0), 0)
    tl.store(db + expert * width + c, acc.to(db.dtype.element_ty), mask=c < width)


# Tokens


@triton.jit
def combine(
    rows, row_of_slot, weights, offsets, out, tokens, width,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k (weight[t, k] ·) rows[row of slot (t, k)], in fp32, in the order of k, without dropped slots."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.load(offsets + EXPERTS - 1)
    mask = (t < tokens)[:, None] & (c < width)[None, :]
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot + t * TOP_K + k, mask=t < tokens, other=0)
        there = mask & (row < kept)[:, None]
        term = tl.load(rows + row.to(tl.int64)[:, None] * width + c[None, :], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + t * TOP_K + k, mask=t < tokens, other=0.0)
            term = tl.where(there, term * weight[:, None], 0.0)
        acc += term
    tl.store(out + t.to(tl.int64)[:, None] * width + c[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def slot_gradient(
    partial, dy, b_out, row_of_slot, expert_of_slot, offsets, d_weights, slots, blocks, width,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dL/dweight of each slot: Σ of its row's partial sums, and dL/dy · b_out of its expert; 0 for a dropped slot."""
    s = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_of_slot + s, mask=s < slots, other=0)
    there = (s < slots) & (row < tl.load(offsets + EXPERTS - 1))
    b = tl.arange(0, BLOCKS)
    parts = tl.load(
        partial + row.to(tl.int64)[:, None] * blocks + b[None, :],
        mask=there[:, None] & (b < blocks)[None, :],
        other=0.0,
    )
    total = tl.sum(parts, 1)
    if HAS_BIAS:
        expert = tl.load(expert_of_slot + s, mask=there, other=0).to(tl.int64)
        for first in range(0, width, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            mask = there[:, None] & (c < width)[None, :]
            g = tl.load(dy + (s // TOP_K).to(tl.int64)[:, None] * width + c[None, :], mask=mask, other=0.0)
            bias = tl.load(b_out + expert[:, None] * width + c[None, :], mask=mask, other=0.0)
            total += tl.sum(g.to(tl.float32) * bias.to(tl.float32), 1)
    tl.store(d_weights + s, tl.where(there, total, 0.0), mask=s < slots)
