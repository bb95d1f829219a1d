"""LLVM code of the block product: 64 rows of int4 weights become bfloat16 in the cache, and are multiplied there.

A block is what torch's AVX-512 int4 op packs together: for each column 32 bytes, rows 0 to 31 in the low nibbles, rows
32 to 63 in the high ones. `@dequantize` writes one group of its columns as pairs of columns, row by row, the operand of
`vdpbf16ps`; `@multiply` adds one chunk of columns to the float32 sums of up to six rows of x.
"""

from collections.abc import Iterable

MOST_ROWS = 128  # of x in one call: their sums take 32 KiB
_CHUNK = 512  # columns dequantized before they are multiplied: 64 KiB
_AT_ONCE = 6  # rows of x whose sums stay in registers: 24 of 32
_VECTORS = range(4)  # of 16 rows of weights

_F32, _I32, _BF16 = "<16 x float>", "<16 x i32>", "<32 x bfloat>"
_ARGUMENTS = ("x", "words", "pairs", "out", "taken", "m", "n", "k", "group", "blocks")


def write_block_code() -> str:
    """Return the module: `@run(args, threads)` over an array of int64, in the order of `_ARGUMENTS`.

    x, words, pairs, out: addresses of (m, k) bfloat16, (n, k / 2) uint8 and (k / group, n, 2) bfloat16 as
    `int4pack_cpu.pack` makes them, and (m, n) bfloat16. taken: 0; threads count there the blocks that they take.
    blocks: n // 64; columns of `out` beyond them are not written. m is at most `MOST_ROWS`; group is even and divides
    k and 512.
    """
    kernels = [_multiply(rows) for rows in range(1, _AT_ONCE + 1)]
    return "\n".join([_DECLARATIONS, *kernels, _dequantize(), _block(), _worker(), _ATTRIBUTES])


_DECLARATIONS = f"""
declare {_F32} @llvm.x86.avx512bf16.dpbf16ps.512({_F32}, {_BF16}, {_BF16})
declare {_BF16} @llvm.x86.avx512bf16.cvtne2ps2bf16.512({_F32}, {_F32})
declare {_F32} @llvm.x86.avx512.permvar.sf.512({_F32}, {_I32})
declare {_F32} @llvm.fma.v16f32({_F32}, {_F32}, {_F32})
declare {_F32} @llvm.rint.v16f32({_F32})
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @GOMP_parallel(ptr, ptr, i32, i32)
"""
_ATTRIBUTES = 'attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }\n'


def _each(parts: Iterable[str]) -> str:
    return "".join(parts)


def _constant(kind: str, values: Iterable[object]) -> str:
    return "<" + ", ".join(f"{kind} {value}" for value in values) + ">"


def _splat(value: int) -> str:
    return _constant("i32", [value] * 16)


def _dequantize() -> str:
    """One group. The scale times (q - zero) is exact in float32 and rounded once, as in the kept copies.

    The op keeps (8 - zero) * scale, rounded; the integer in it is found again.
    """
    levels = _constant("float", (float(level) for level in range(-8, 8)))
    scales = _each(
        f"""
  %pair_at{v} = getelementptr i8, ptr %pairs, i64 {64 * v}
  %pair{v} = load {_I32}, ptr %pair_at{v}, align 4
  %scale_bits{v} = shl {_I32} %pair{v}, {_splat(16)}
  %scale{v} = bitcast {_I32} %scale_bits{v} to {_F32}
  %zero_bits{v} = and {_I32} %pair{v}, {_splat(-(1 << 16))}
  %zero{v} = bitcast {_I32} %zero_bits{v} to {_F32}
  %ratio{v} = fdiv {_F32} %zero{v}, %scale{v}
  %whole{v} = call {_F32} @llvm.rint.v16f32({_F32} %ratio{v})
  %none{v} = fcmp oeq {_F32} %scale{v}, zeroinitializer
  %steps{v} = select <16 x i1> %none{v}, {_F32} zeroinitializer, {_F32} %whole{v}
  %offset{v} = fmul {_F32} %steps{v}, %scale{v}"""
        for v in _VECTORS
    )
    return f"""
define internal void @dequantize(ptr %words, ptr %pairs, ptr %tile, i64 %count) #0 {{
entry:{scales}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %from = getelementptr [64 x i8], ptr %words, i64 %i
  %to = getelementptr [256 x i8], ptr %tile, i64 %i
{_each(_weight(half, column, levels) for half in (0, 1) for column in (0, 1))}
{_each(_column_pair(half, nibble) for half in (0, 1) for nibble in (0, 1))}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


def _weight(half: int, column: int, levels: str) -> str:
    """Load 16 bytes of a column: the table reads the low four bits of an index, so low nibbles need no mask."""
    here = f"{half}{column}"
    nibbles = _each(
        f"""
  %level{here}{nibble} = call {_F32} @llvm.x86.avx512.permvar.sf.512({_F32} {levels}, {_I32} %index{here}{nibble})
  %weight{here}{nibble} = call {_F32} @llvm.fma.v16f32({_F32} %level{here}{nibble},
                                                       {_F32} %scale{v}, {_F32} %offset{v})"""
        for nibble, v in ((0, half), (1, half + 2))
    )
    return f"""
  %byte_at{here} = getelementptr i8, ptr %from, i64 {32 * column + 16 * half}
  %byte{here} = load <16 x i8>, ptr %byte_at{here}, align 1
  %index{here}0 = zext <16 x i8> %byte{here} to {_I32}
  %index{here}1 = lshr {_I32} %index{here}0, {_splat(4)}{nibbles}"""


def _column_pair(half: int, nibble: int) -> str:
    """Round 16 rows of two columns and store them row by row."""
    here, order = f"{half}{nibble}", _constant("i32", (row + 16 * column for row in range(16) for column in (0, 1)))
    return f"""
  %both{here} = call {_BF16} @llvm.x86.avx512bf16.cvtne2ps2bf16.512({_F32} %weight{half}1{nibble},
                                                                    {_F32} %weight{half}0{nibble})
  %by_row{here} = shufflevector {_BF16} %both{here}, {_BF16} poison, <32 x i32> {order}
  %to{here} = getelementptr i8, ptr %to, i64 {64 * (half + 2 * nibble)}
  store {_BF16} %by_row{here}, ptr %to{here}, align 64"""


def _multiply(rows: int) -> str:
    sums = [(r, v) for r in range(rows) for v in _VECTORS]
    loads = _each(
        f"""
  %at{r}_{v} = getelementptr float, ptr %sums, i64 {64 * r + 16 * v}
  %from{r}_{v} = load {_F32}, ptr %at{r}_{v}, align 64"""
        for r, v in sums
    )
    starts = _each(
        f"\n  %row_bytes{r} = mul i64 %stride, {2 * r}\n  %row{r} = getelementptr i8, ptr %x, i64 %row_bytes{r}"
        for r in range(rows)
    )
    loops = _each(f"\n  %sum{r}_{v} = phi {_F32} [%from{r}_{v}, %entry], [%new{r}_{v}, %loop]" for r, v in sums)
    weights = _each(
        f"\n  %w_at{v} = getelementptr i8, ptr %here, i64 {64 * v}\n  %w{v} = load {_BF16}, ptr %w_at{v}, align 64"
        for v in _VECTORS
    )
    stores = _each(f"\n  store {_F32} %new{r}_{v}, ptr %at{r}_{v}, align 64" for r, v in sums)
    return f"""
define internal void @multiply{rows}(ptr %x, i64 %stride, ptr %tile, ptr %sums, i64 %count) #0 {{
entry:{loads}{starts}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]{loops}
  %here = getelementptr [256 x i8], ptr %tile, i64 %i{weights}{_each(_row_of_x(r) for r in range(rows))}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:{stores}
  ret void
}}
"""


def _row_of_x(r: int) -> str:
    call = f"call {_F32} @llvm.x86.avx512bf16.dpbf16ps.512"
    products = _each(f"\n  %new{r}_{v} = {call}({_F32} %sum{r}_{v}, {_BF16} %x{r}, {_BF16} %w{v})" for v in _VECTORS)
    return f"""
  %x_at{r} = getelementptr i32, ptr %row{r}, i64 %i
  %two{r} = load i32, ptr %x_at{r}, align 2
  %first{r} = insertelement {_I32} poison, i32 %two{r}, i32 0
  %all{r} = shufflevector {_I32} %first{r}, {_I32} poison, {_I32} zeroinitializer
  %x{r} = bitcast {_I32} %all{r} to {_BF16}{products}"""


def _block() -> str:
    """All rows of x times one block, chunk after chunk of its columns."""
    return f"""
define internal void @block(ptr %x, ptr %words, ptr %pairs, ptr %out, i64 %m, i64 %n, i64 %k, i64 %group,
                            ptr %tile, ptr %sums) #0 {{
entry:
  %sums_bytes = shl i64 %m, 8
  call void @llvm.memset.p0.i64(ptr align 64 %sums, i8 0, i64 %sums_bytes, i1 false)
  %pairs_step = shl i64 %n, 2
  %group_count = lshr i64 %group, 1
  br label %chunk
chunk:
  %start = phi i64 [0, %entry], [%end, %multiplied]
  %chunk_pairs = phi ptr [%pairs, %entry], [%next_pairs, %multiplied]
  %left = sub i64 %k, %start
  %last = icmp ult i64 %left, {_CHUNK}
  %columns = select i1 %last, i64 %left, i64 {_CHUNK}
  %end = add i64 %start, %columns
  br label %group_of_chunk{_groups_of_chunk()}{_rows_of_chunk()}
multiplied:
  %more_chunks = icmp ult i64 %end, %k
  br i1 %more_chunks, label %chunk, label %store{_store()}
finished:
  ret void
}}
"""


def _groups_of_chunk() -> str:
    return """
group_of_chunk:
  %g = phi i64 [0, %chunk], [%next_g, %group_of_chunk]
  %group_pairs = phi ptr [%chunk_pairs, %chunk], [%next_pairs, %group_of_chunk]
  %column = add i64 %start, %g
  %words_at = getelementptr [32 x i8], ptr %words, i64 %column
  %tile_at = getelementptr [128 x i8], ptr %tile, i64 %g
  call void @dequantize(ptr %words_at, ptr %group_pairs, ptr %tile_at, i64 %group_count)
  %next_pairs = getelementptr i8, ptr %group_pairs, i64 %pairs_step
  %next_g = add i64 %g, %group
  %more_groups = icmp ult i64 %next_g, %columns
  br i1 %more_groups, label %group_of_chunk, label %dequantized"""


def _rows_of_chunk() -> str:
    """Multiply six rows at a time. Seven and eight are 4 + 3 and 4 + 4: a few sums alone wait for each other."""
    kernels = range(1, _AT_ONCE + 1)
    takes = {**{rows: rows for rows in kernels}, 7: 4, 8: 4}
    choices = " ".join(f"i64 {left}, label %take{rows}" for left, rows in takes.items())
    calls = _each(
        f"""
take{rows}:
  call void @multiply{rows}(ptr %x_at, i64 %k, ptr %tile, ptr %sums_at, i64 %count)
  br label %taken"""
        for rows in kernels
    )
    return f"""
dequantized:
  %count = lshr i64 %columns, 1
  br label %rows
rows:
  %row = phi i64 [0, %dequantized], [%next_row, %taken]
  %rows_left = sub i64 %m, %row
  %skipped = mul i64 %row, %k
  %first = add i64 %skipped, %start
  %x_at = getelementptr i16, ptr %x, i64 %first
  %sums_at = getelementptr [256 x i8], ptr %sums, i64 %row
  switch i64 %rows_left, label %take{_AT_ONCE} [{choices}]{calls}
taken:
  %took = phi i64 {", ".join(f"[{rows}, %take{rows}]" for rows in kernels)}
  %next_row = add i64 %row, %took
  %more_rows = icmp ult i64 %next_row, %m
  br i1 %more_rows, label %rows, label %multiplied"""


def _store() -> str:
    return f"""
store:
  %r = phi i64 [0, %multiplied], [%next_r, %store]
  %done_at = getelementptr [256 x i8], ptr %sums, i64 %r
  %out_row = mul i64 %r, %n
  %out_at = getelementptr i16, ptr %out, i64 %out_row{_each(map(_stored, _VECTORS))}
  %next_r = add i64 %r, 1
  %more_r = icmp ult i64 %next_r, %m
  br i1 %more_r, label %store, label %finished"""


def _stored(v: int) -> str:
    return f"""
  %sum_at{v} = getelementptr i8, ptr %done_at, i64 {64 * v}
  %sum{v} = load {_F32}, ptr %sum_at{v}, align 64
  %rounded{v} = fptrunc {_F32} %sum{v} to <16 x bfloat>
  %out_at{v} = getelementptr i16, ptr %out_at, i64 {16 * v}
  store <16 x bfloat> %rounded{v}, ptr %out_at{v}, align 2"""


def _worker() -> str:
    """Each thread takes blocks until none is left. GOMP_parallel runs it on the threads that torch's operators use."""
    loads = _each(
        f"\n  %{name}_at = getelementptr i64, ptr %args, i64 {position}"
        + ("" if name == "taken" else f"\n  %{name} = load {'ptr' if position < 4 else 'i64'}, ptr %{name}_at, align 8")
        for position, name in enumerate(_ARGUMENTS)
    )
    return f"""
define internal void @worker(ptr %args) #0 {{
entry:
  %tile = alloca [{128 * _CHUNK} x i8], align 64
  %sums = alloca [{256 * MOST_ROWS} x i8], align 64{loads}
  %block_bytes = shl i64 %k, 5
  br label %take
take:
  %number = atomicrmw add ptr %taken_at, i64 1 monotonic
  %some = icmp ult i64 %number, %blocks
  br i1 %some, label %work, label %none
work:
  %skipped = mul i64 %block_bytes, %number
  %block_words = getelementptr i8, ptr %words, i64 %skipped
  %block_pairs = getelementptr [256 x i8], ptr %pairs, i64 %number
  %block_out = getelementptr [128 x i8], ptr %out, i64 %number
  call void @block(ptr %x, ptr %block_words, ptr %block_pairs, ptr %block_out, i64 %m, i64 %n, i64 %k, i64 %group,
                   ptr %tile, ptr %sums)
  br label %take
none:
  ret void
}}

define void @run(ptr %args, i32 %threads) {{
  call void @GOMP_parallel(ptr @worker, ptr %args, i32 %threads, i32 0)
  ret void
}}
"""
