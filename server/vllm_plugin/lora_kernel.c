/* LoRA on the rows of one batch that belong to different adapters: one call for all slices of one layer.
 *
 *   y[row] += scale * (x[row] @ A_s) @ B_s      for each row of each slot s in the batch, slice by slice of y
 *
 * x and y are float32, bfloat16 or float16; A and B keep the dtype that the adapter has; all sums are float32. A row's
 * result depends on nothing but that row and its adapter: not on the rows beside it, nor on the number of threads.
 *
 * C with the vector extensions of GCC and Clang, compiled once for each level of instructions (kernel_build.py). Its
 * threads are those of the process's OpenMP runtime, handed in by hotshoe_lora_threads: a second runtime in the process
 * would fight with torch's for the cores.
 *
 * Layout of the weights. Both sides are cut into tiles of TILE columns, and a tile is contiguous: A is
 * [columns / TILE][in][TILE], all slices' ranks side by side, the last tile as wide as a multiple of 8; B of each slice
 * is [size / TILE][rank][TILE], likewise. So decode, which is bound by memory, reads each adapter as one stream.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define ABI 1
#define TILE 32           /* columns; as kernel.py cuts them */
#define PANEL 48          /* rows that are shrunk and expanded before the next ones, so that they stay in the cache */
#define CHUNK 256         /* inputs whose products are summed before that sum is added to the others' */
#define AHEAD 2048        /* bytes of the weights' stream that are fetched before they are used */
#define BOUNDARY 64       /* bytes of a cache line, between two threads' scratch */
#define LEAST_WORK 65536L /* multiplications that are worth a thread */

#if defined(__AVX512F__)
#define WIDE 16
#define ROWS 12
#elif defined(__AVX2__)
#define WIDE 8
#define ROWS 6
#else
#define WIDE 8
#define ROWS 2
#endif

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* One slice of one slot. y's columns [first, first + size) += s's columns [s_first, s_first + rank) @ b. */
struct part {
    const void *b;
    int32_t b_dtype, rank, s_first, first, size, reserved;
};

/* One slot of one layer; `columns` is the sum of the ranks, rounded up to a multiple of 8. No parts: not adapted. */
struct slot {
    const void *a;
    int32_t a_dtype, columns, num_parts, reserved;
    const struct part *parts;
};

struct layer {
    int32_t in, num_slots;
    const struct slot *slots;
};

/* Group g is rows[starts[g]] to rows[starts[g + 1] - 1], all of the slot slots[g]. Rows ascend within a group. */
struct batch {
    int32_t num_groups, num_rows;
    const int32_t *slots, *starts, *rows;
};

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t half8 __attribute__((vector_size(16)));
typedef uint16_t half8u __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t word8 __attribute__((vector_size(32)));
#if WIDE == 16
typedef float vec16 __attribute__((vector_size(64)));
typedef float vec16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half16 __attribute__((vector_size(32)));
typedef uint16_t half16u __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t word16 __attribute__((vector_size(64)));
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    union { uint32_t bits; float value; } out;
    if (exponent == 0) { /* zero and subnormal numbers: fraction * 2^-24, exact */
        out.value = (float)fraction * 0x1p-24f;
        out.bits |= sign;
    } else {
        out.bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    }
    return out.value;
}

/* Round to nearest, ties to even. */
INLINE uint16_t half_of_float(float value)
{
    union { float value; uint32_t bits; } in = {value}, magic;
    uint32_t sign = in.bits >> 16 & 0x8000, rest = in.bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) { /* subnormal there: adding 0.5 shifts and rounds */
        magic.bits = rest;
        magic.value += 0.5f;
        return (uint16_t)(sign | (magic.bits - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}

INLINE uint16_t bfloat_of_float(float value)
{
    union { float value; uint32_t bits; } in = {value};
    if ((in.bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(in.bits >> 16 | 0x40);
    return (uint16_t)((in.bits + 0x7fff + (in.bits >> 16 & 1)) >> 16);
}

INLINE vec8 load8(const char *from, int dtype)
{
    if (dtype == FLOAT32)
        return (vec8)*(const vec8u *)from;
    if (dtype == BFLOAT16)
        return (vec8)(__builtin_convertvector((half8)*(const half8u *)from, word8) << 16);
#if defined(__F16C__)
    return (vec8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    vec8 out;
    for (int i = 0; i < 8; i++)
        out[i] = float_of_half(((const uint16_t *)from)[i]);
    return out;
#endif
}

INLINE void store8(char *to, vec8 value, int dtype)
{
    if (dtype == FLOAT32) {
        *(vec8u *)to = value;
    } else if (dtype == BFLOAT16) {
        word8 bits = (word8)value;
        word8 is_nan = (word8)((bits & 0x7fffffff) > 0x7f800000);
        word8 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        rounded = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
        *(half8u *)to = __builtin_convertvector(rounded, half8);
    } else {
#if defined(__F16C__)
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < 8; i++)
            ((uint16_t *)to)[i] = half_of_float(value[i]);
#endif
    }
}

#if WIDE == 16
INLINE vec16 load16(const char *from, int dtype)
{
    if (dtype == FLOAT32)
        return (vec16)*(const vec16u *)from;
    if (dtype == BFLOAT16)
        return (vec16)(__builtin_convertvector((half16)*(const half16u *)from, word16) << 16);
    return (vec16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

INLINE void store16(char *to, vec16 value, int dtype)
{
    if (dtype == FLOAT32) {
        *(vec16u *)to = value;
    } else if (dtype == BFLOAT16) {
        word16 bits = (word16)value;
        word16 is_nan = (word16)((bits & 0x7fffffff) > 0x7f800000);
        word16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        rounded = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
        *(half16u *)to = __builtin_convertvector(rounded, half16);
    } else {
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
    }
}
#endif

INLINE long bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* A product of up to ROWS rows with some columns of a tile: out[i] (=, +=) scale * x[i] (1 x k) @ w (k x columns).
 * `stride` is the tile's width. */
struct product {
    const float *x[ROWS];
    char *out[ROWS];
    const char *w;
    long k, stride;
    float scale;
    int32_t w_dtype, out_dtype, adds;
};

#define UNROLLED _Pragma("GCC unroll 16")

/* AHEAD hides the memory's latency in decode; in prefill, where the weights are in the cache, it costs nothing. */
#define DEFINE_PRODUCT(NAME, VEC, LOAD, STORE, WIDTH)                                                                  \
    INLINE void NAME(const struct product *p, long column, const int rows, const int vectors, const int w_dtype)       \
    {                                                                                                                  \
        VEC sums[ROWS][2], weights[2];                                                                                 \
        const long size = bytes_of(w_dtype), step = p->stride * size, k = p->k;                                        \
        const char *w = p->w + column * size;                                                                          \
        UNROLLED for (int i = 0; i < rows; i++)                                                                        \
            UNROLLED for (int v = 0; v < vectors; v++)                                                                 \
                sums[i][v] = (VEC){0};                                                                                 \
        for (long j = 0; j < k; j++, w += step) {                                                                      \
            UNROLLED for (int v = 0; v < vectors; v++) {                                                               \
                __builtin_prefetch(w + AHEAD + v * WIDTH * size);                                                      \
                weights[v] = LOAD(w + v * WIDTH * size, w_dtype);                                                      \
            }                                                                                                          \
            UNROLLED for (int i = 0; i < rows; i++)                                                                    \
                UNROLLED for (int v = 0; v < vectors; v++)                                                             \
                    sums[i][v] += p->x[i][j] * weights[v];                                                             \
        }                                                                                                              \
        UNROLLED for (int i = 0; i < rows; i++)                                                                        \
            UNROLLED for (int v = 0; v < vectors; v++) {                                                               \
                char *out = p->out[i] + (column + v * WIDTH) * bytes_of(p->out_dtype);                                 \
                VEC sum = sums[i][v];                                                                                  \
                if (p->out_dtype == FLOAT32)                                                                           \
                    STORE(out, p->adds ? LOAD(out, FLOAT32) + p->scale * sum : sum, FLOAT32);                          \
                else if (p->out_dtype == BFLOAT16)                                                                     \
                    STORE(out, LOAD(out, BFLOAT16) + p->scale * sum, BFLOAT16);                                        \
                else                                                                                                   \
                    STORE(out, LOAD(out, FLOAT16) + p->scale * sum, FLOAT16);                                          \
            }                                                                                                          \
    }

DEFINE_PRODUCT(product8, vec8, load8, store8, 8)
#if WIDE == 16
DEFINE_PRODUCT(product16, vec16, load16, store16, 16)
#else
#define product16 product8
#endif

/* Columns [0, width) of a tile; width is a multiple of 8. */
INLINE void product_of(const struct product *p, long width, const int rows, const int w_dtype)
{
    long column = 0;
#if WIDE == 16 || defined(__AVX2__)
    for (; column + 2 * WIDE <= width; column += 2 * WIDE)
        product16(p, column, rows, 2, w_dtype);
#endif
#if WIDE == 16
    for (; column + 16 <= width; column += 16)
        product16(p, column, rows, 1, w_dtype);
#endif
    for (; column + 8 <= width; column += 8)
        product8(p, column, rows, 1, w_dtype);
}

#define DEFINE_ROWS(N)                                                         \
    static void product_rows##N(const struct product *p, long width)           \
    {                                                                          \
        if (p->w_dtype == FLOAT32)                                             \
            product_of(p, width, N, FLOAT32);                                  \
        else if (p->w_dtype == BFLOAT16)                                       \
            product_of(p, width, N, BFLOAT16);                                 \
        else                                                                   \
            product_of(p, width, N, FLOAT16);                                  \
    }
#if ROWS >= 12
DEFINE_ROWS(12)
DEFINE_ROWS(8)
#endif
#if ROWS >= 6
DEFINE_ROWS(6)
DEFINE_ROWS(4)
#endif
DEFINE_ROWS(2)
DEFINE_ROWS(1)

static int multiply(const struct product *p, long width, int rows)
{
#if ROWS >= 12
    if (rows >= 12)
        return product_rows12(p, width), 12;
    if (rows >= 8)
        return product_rows8(p, width), 8;
#endif
#if ROWS >= 6
    if (rows >= 6)
        return product_rows6(p, width), 6;
    if (rows >= 4)
        return product_rows4(p, width), 4;
#endif
    if (rows >= 2)
        return product_rows2(p, width), 2;
    return product_rows1(p, width), 1;
}

/* What one call works on. */
struct call {
    const struct layer *layer;
    const struct batch *batch;
    const char *x;
    char *y;
    long x_step, y_step; /* bytes from one row to the next */
    int x_dtype, y_dtype;
    float scale;
    long chunk, num_chunks;
    char *scratch;
    long scratch_step; /* bytes for each thread */
    int threads;
};

/* Some rows of one group. */
struct panel {
    const struct slot *slot;
    const int32_t *rows;
    int count;
};

static const float *floats_of(const char *x, int dtype, long k, float *room)
{
    long j = 0;
    for (; j + 8 <= k; j += 8)
        *(vec8u *)(room + j) = load8(x + j * 2, dtype);
    for (; j < k; j++) {
        uint16_t half = ((const uint16_t *)x)[j];
        union { uint32_t bits; float value; } wide = {(uint32_t)half << 16};
        room[j] = dtype == BFLOAT16 ? wide.value : float_of_half(half);
    }
    return room;
}

static void point_at(const struct call *c, const struct panel *panel, long first, long k, float *room, const float **x)
{
    for (int i = 0; i < panel->count; i++) {
        const char *row = c->x + panel->rows[i] * c->x_step + first * bytes_of(c->x_dtype);
        x[i] = c->x_dtype == FLOAT32 ? (const float *)row : floats_of(row, c->x_dtype, k, room + i * c->chunk);
    }
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* s (count x columns) = x's rows @ A over inputs [first, first + k): one tile, added to what is there or not. */
static void shrink_tile(const struct call *c, const struct panel *panel, const float *const *x, long tile, long first,
                        long k, float *s, int adds)
{
    const struct slot *slot = panel->slot;
    long width = least(TILE, slot->columns - tile * TILE), size = bytes_of(slot->a_dtype);
    struct product p = {
        .k = k, .stride = width, .scale = 1, .w_dtype = slot->a_dtype, .out_dtype = FLOAT32, .adds = adds,
    };
    p.w = (const char *)slot->a + (tile * TILE * c->layer->in + first * width) * size;
    for (int i = 0; i < panel->count;) {
        for (int j = 0; j < ROWS && i + j < panel->count; j++) {
            p.x[j] = x[i + j];
            p.out[j] = (char *)(s + (long)(i + j) * slot->columns + tile * TILE);
        }
        i += multiply(&p, width, panel->count - i);
    }
}

INLINE long tiles_of(long columns) { return (columns + TILE - 1) / TILE; }

static void shrink(const struct call *c, const struct panel *panel, float *room, float *s)
{
    const float *x[PANEL];
    for (long chunk = 0; chunk < c->num_chunks; chunk++) {
        long first = chunk * c->chunk, k = least(c->chunk, c->layer->in - first);
        point_at(c, panel, first, k, room, x);
        for (long tile = 0; tile < tiles_of(panel->slot->columns); tile++)
            shrink_tile(c, panel, x, tile, first, k, s, chunk > 0);
    }
}

/* y's rows += scale * s @ B for tiles [tile, end) of one part; a last tile that is no multiple of 8 goes through a
 * copy. */
static void expand(const struct call *c, const struct panel *panel, const struct part *part, const float *s, long tile,
                   long end)
{
    long size = bytes_of(part->b_dtype), y_size = bytes_of(c->y_dtype);
    struct product p = {
        .k = part->rank, .scale = c->scale, .w_dtype = part->b_dtype, .out_dtype = c->y_dtype, .adds = 1,
    };
    char copies[ROWS][TILE * 4];
    for (int i = 0; i < panel->count;) {
        int taken = 0, most = least(ROWS, panel->count - i);
        for (long t = tile; t < end; t++) {
            long width = least(TILE, part->size - t * TILE), padded = (width + 7) & ~7L;
            p.stride = padded;
            p.w = (const char *)part->b + t * TILE * part->rank * size;
            for (int j = 0; j < most; j++) {
                char *y = c->y + panel->rows[i + j] * c->y_step + (part->first + t * TILE) * y_size;
                p.x[j] = s + (long)(i + j) * panel->slot->columns + part->s_first;
                p.out[j] = y;
                if (padded != width) {
                    memset(copies[j], 0, sizeof copies[j]);
                    p.out[j] = memcpy(copies[j], y, width * y_size);
                }
            }
            taken = multiply(&p, padded, most);
            if (padded != width)
                for (int j = 0; j < taken; j++)
                    memcpy(c->y + panel->rows[i + j] * c->y_step + (part->first + t * TILE) * y_size, copies[j],
                           width * y_size);
        }
        if (!taken)
            return;
        i += taken;
    }
}

/* ---- which panel, and which thread ---- */

static int panel_at(const struct call *c, long index, struct panel *panel)
{
    const struct batch *b = c->batch;
    for (int g = 0; g < b->num_groups; g++) {
        const struct slot *slot = c->layer->slots + b->slots[g];
        long count = b->starts[g + 1] - b->starts[g], panels = slot->num_parts ? (count + PANEL - 1) / PANEL : 0;
        if (index < panels) {
            panel->slot = slot;
            panel->rows = b->rows + b->starts[g] + index * PANEL;
            panel->count = (int)least(PANEL, count - index * PANEL);
            return 1;
        }
        index -= panels;
    }
    return 0;
}

static long count_panels(const struct call *c)
{
    long panels = 0;
    for (int g = 0; g < c->batch->num_groups; g++)
        if (c->layer->slots[c->batch->slots[g]].num_parts)
            panels += (c->batch->starts[g + 1] - c->batch->starts[g] + PANEL - 1) / PANEL;
    return panels;
}

static void whole_panels(const struct call *c, int thread, long panels)
{
    float *s = (float *)(c->scratch + thread * c->scratch_step);
    struct panel panel;
    for (long i = thread * panels / c->threads; i < (thread + 1) * panels / c->threads; i++) {
        panel_at(c, i, &panel);
        float *room = s + (long)PANEL * panel.slot->columns;
        shrink(c, &panel, room, s);
        for (int part = 0; part < panel.slot->num_parts; part++)
            expand(c, &panel, panel.slot->parts + part, s, 0, tiles_of(panel.slot->parts[part].size));
    }
}

/* Few rows and several threads: first every (panel, tile of A, chunk of the inputs) is a task, then runs of tiles of B.
 * `shared` has for each panel s, then the sums of each chunk; `room` is one for each thread. */
struct split {
    const struct call *call;
    long panels, tasks, panel_step, chunk_step;
    float *shared;
};

static void shrink_task(const struct split *split, long task, float *room)
{
    const struct call *c = split->call;
    struct panel panel;
    const float *x[PANEL];
    for (long i = 0; i < split->panels && panel_at(c, i, &panel); i++) {
        long tiles = tiles_of(panel.slot->columns), tasks = tiles * c->num_chunks;
        if (task < tasks) {
            long chunk = task / tiles, first = chunk * c->chunk, k = least(c->chunk, c->layer->in - first);
            if (k <= 0)
                return;
            point_at(c, &panel, first, k, room, x);
            shrink_tile(c, &panel, x, task % tiles, first, k,
                        split->shared + i * split->panel_step + chunk * split->chunk_step, 0);
            return;
        }
        task -= tasks;
    }
}

static void add_chunks(const struct split *split)
{
    const struct call *c = split->call;
    struct panel panel;
    for (long i = 0; i < split->panels && panel_at(c, i, &panel); i++) {
        float *s = split->shared + i * split->panel_step;
        for (long chunk = 1; chunk < c->num_chunks && chunk * c->chunk < c->layer->in; chunk++)
            for (long j = 0; j < (long)panel.count * panel.slot->columns; j++)
                s[j] += s[chunk * split->chunk_step + j];
    }
}

static void expand_tasks(const struct split *split, long begin, long end)
{
    const struct call *c = split->call;
    struct panel panel;
    for (long i = 0; i < split->panels && panel_at(c, i, &panel); i++)
        for (int p = 0; p < panel.slot->num_parts; p++) {
            const struct part *part = panel.slot->parts + p;
            long tiles = tiles_of(part->size), from = begin > 0 ? begin : 0, to = least(end, tiles);
            if (from < to)
                expand(c, &panel, part, split->shared + i * split->panel_step, from, to);
            begin -= tiles;
            end -= tiles;
        }
}

typedef void (*region)(void (*)(void *), void *, unsigned, unsigned);
static region run_region;           /* GOMP_parallel */
static int (*thread_number)(void);  /* omp_get_thread_num */
static int (*thread_count)(void);   /* omp_get_num_threads */

static void region_of_panels(void *data)
{
    const struct split *split = data;
    struct call call = *split->call;
    int team = thread_count(); /* the runtime may give fewer than were asked for */
    for (int thread = thread_number(); thread < call.threads; thread += team)
        whole_panels(&call, thread, split->panels);
}

static void region_of_shrinking(void *data)
{
    const struct split *split = data;
    int team = thread_count(), me = thread_number();
    float *room = (float *)(split->call->scratch + me * split->call->scratch_step);
    for (long task = me; task < split->tasks; task += team)
        shrink_task(split, task, room);
}

static void region_of_expanding(void *data)
{
    const struct split *split = data;
    int team = thread_count(), me = thread_number();
    expand_tasks(split, me * split->tasks / team, (me + 1) * split->tasks / team);
}

static _Thread_local char *arena;
static _Thread_local size_t arena_bytes;

static int make_room(size_t bytes)
{
    if (bytes <= arena_bytes)
        return 1;
    free(arena);
    arena_bytes = 0;
    if (posix_memalign((void **)&arena, BOUNDARY, bytes))
        return arena = NULL, 0;
    arena_bytes = bytes;
    return 1;
}

static long work_of(const struct call *c, int *widest)
{
    long work = 0;
    for (int g = 0; g < c->batch->num_groups; g++) {
        const struct slot *slot = c->layer->slots + c->batch->slots[g];
        long each = (long)slot->columns * c->layer->in, rows = c->batch->starts[g + 1] - c->batch->starts[g];
        for (int part = 0; part < slot->num_parts; part++)
            each += (long)slot->parts[part].rank * slot->parts[part].size;
        work += slot->num_parts ? rows * each : 0;
        *widest = slot->columns > *widest ? slot->columns : *widest;
    }
    return work;
}

static int split_rows(struct call *c, long panels, int widest, long room)
{
    struct split split = {.call = c, .panels = panels};
    struct panel panel;
    int most = 0;
    for (long i = 0; i < panels && panel_at(c, i, &panel); i++) {
        split.tasks += tiles_of(panel.slot->columns) * c->num_chunks;
        most = panel.count > most ? panel.count : most;
    }
    split.chunk_step = (long)most * widest;
    split.panel_step = split.chunk_step * c->num_chunks;
    c->scratch_step = (room * 4 + BOUNDARY - 1) / BOUNDARY * BOUNDARY;
    if (!make_room(c->threads * c->scratch_step + panels * split.panel_step * 4))
        return -2;
    c->scratch = arena;
    split.shared = (float *)(arena + c->threads * c->scratch_step);
    run_region(region_of_shrinking, &split, c->threads, 0);
    add_chunks(&split);
    split.tasks = 0;
    for (long i = 0; i < panels && panel_at(c, i, &panel); i++)
        for (int p = 0; p < panel.slot->num_parts; p++)
            split.tasks += tiles_of(panel.slot->parts[p].size);
    run_region(region_of_expanding, &split, c->threads, 0);
    return 0;
}

static int whole_rows(struct call *c, long panels, int widest, long room)
{
    struct split split = {.call = c, .panels = panels};
    long floats = (long)PANEL * widest + (room > c->layer->in ? room : c->layer->in);
    c->scratch_step = (floats * 4 + BOUNDARY - 1) / BOUNDARY * BOUNDARY;
    if (!make_room(c->threads * c->scratch_step))
        return -2;
    c->scratch = arena;
    if (c->threads == 1)
        whole_panels(c, 0, panels);
    else
        run_region(region_of_panels, &split, c->threads, 0);
    return 0;
}

/* How many inputs are summed before that sum is added to the others': from the layer's size alone, so that a row's
 * result does not depend on how the work is split. */
static long chunk_of(long in)
{
    long chunks = (in + CHUNK - 1) / CHUNK;
    return (in + chunks - 1) / chunks;
}

/* ---- what Python calls ---- */

#define EXPORT __attribute__((visibility("default")))

EXPORT int hotshoe_lora_abi(void) { return ABI; }

/* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the process's own OpenMP runtime. */
EXPORT void hotshoe_lora_threads(void *parallel, void *number, void *count)
{
    run_region = (region)parallel;
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
}

/* 0, or -1: the batch has rows that x and y, of num_rows rows each, have not; -2: there is no memory; -3: the batch has
 * a slot that the layer has not. */
EXPORT int hotshoe_lora_apply(const struct layer *layer, const struct batch *batch, void *y, const void *x, long y_step,
                              long x_step, long num_rows, int dtype, int threads, float scale)
{
    struct call call = {.layer = layer, .batch = batch, .x = x, .y = y, .x_step = x_step * bytes_of(dtype),
                        .y_step = y_step * bytes_of(dtype), .x_dtype = dtype, .y_dtype = dtype, .scale = scale};
    int widest = 0;
    if (batch->num_rows > num_rows)
        return -1;
    for (int g = 0; g < batch->num_groups; g++)
        if (batch->slots[g] >= layer->num_slots)
            return -3;
    long work = work_of(&call, &widest), panels = count_panels(&call);
    if (!panels)
        return 0;
    call.chunk = chunk_of(layer->in);
    call.num_chunks = (layer->in + call.chunk - 1) / call.chunk;
    call.threads = run_region ? (int)least(threads, work / LEAST_WORK + 1) : 1;
    long room = PANEL * call.chunk;
    if (call.threads > 1 && panels < 2 * call.threads)
        return split_rows(&call, panels, widest, room);
    return whole_rows(&call, panels, widest, room);
}
