/* One step of decoding on a CPU: the GPT of model.py reads one token of each of B sequences.

   decode.py compiles this file and calls it. Read model.py first: this is the same arithmetic in the same
   order of parts, on plain arrays, after llm.c and llama2.c (Karpathy 2023, 2024). Letters as there: B batch,
   C n_embd, nh heads, nkv key/value heads, hs head size, V vocab_size, S tokens attended to.

   Every thread runs all of `decode`. The costly parts are split among the threads, mostly by rows of a weight
   matrix; a norm costs less than waiting for another thread, so each thread computes it for itself. Barriers
   separate what one thread writes from what another reads. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

enum { GELU, RELU2, SWIGLU };

/* weight (out, in) of float, scale NULL; or of int8, scale (out). bias (out) or NULL. */
typedef struct { const void *weight; const float *scale, *bias; } Linear;
typedef struct { const float *ln_1, *ln_2; Linear attn, attn_proj, gate, fc, mlp_proj; } Layer;

/* The fields of Linear, Layer and Model are those of the classes in decode.py, in the same order. */
typedef struct {
    int32_t n_layer, n_head, n_kv_head, n_embd, hidden, vocab_size, activation, qk_norm, layernorm, n_threads;
    float norm_eps;
    const float *wte, *wpe, *cos, *sin, *ln_f; /* wpe, or cos and sin, NULL */
    const float *const *prev;                  /* n_prev tables (V, C) */
    const Layer *layers;
    Linear lm_head;
} Model;

#define LANES 8
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE float larger(float a, float b) { return a > b ? a : b; } /* fmaxf, but it can run in vector lanes */

INLINE float sum_of(vec v) {
    half_vec low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (char *)&v + sizeof low, sizeof high);
    low += high;
    return (low[0] + low[2]) + (low[1] + low[3]);
}

/* w (n) · x (n), with four sums, which hide the latency of a multiply-add. One row at a time, since memory is
   read fastest in one stream. */
INLINE float dot_float(const float *w, const float *x, int n) {
    vec sum[4] = {{0}};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++)
            sum[j] += *(const vec *)(w + i + j * LANES) * *(const vec *)(x + i + j * LANES);
    float total = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++)
        total += w[i] * x[i];
    return total;
}

/* The sums of 16 products in pairs, w[0] x[0] + w[1] x[1], … */
INLINE ints products(const int8_t *w, const int16_t *x) {
#ifdef __AVX2__
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    return (ints)_mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i *)x));
#else
    const ints a = (ints)__builtin_convertvector(*(const bytes *)w, shorts), b = (ints)*(const shorts *)x;
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* The same of int8 and int16, whose sum fits into 32 bits. */
INLINE float dot_int8(const int8_t *w, const int16_t *x, int n) {
    ints sum[2] = {{0}};
    int i = 0, total = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 2; j++)
            sum[j] += products(w + i + 2 * j * LANES, x + i + 2 * j * LANES);
    sum[0] += sum[1];
    for (int lane = 0; lane < LANES; lane++)
        total += sum[0][lane];
    for (; i < n; i++)
        total += w[i] * x[i];
    return total;
}

/* The input of a linear layer, x (B, n), and what `prepare` makes of it. One sequence and int8 weights: q
   (n), integers that times `scale` are x. Several sequences: lanes (groups, n, 16), the numbers of 16
   sequences side by side, and room for six rows of weights. */
typedef struct { const float *x; int16_t *q; float scale, *lanes, *rows; } Input;

enum { GROUP = 2 * LANES, ROWS = 6 }; /* 12 vectors of sums, as many as the registers hold */
INLINE int in_groups(int B) { return (B + GROUP - 1) / GROUP * GROUP; }

static void prepare(Input *in, const Linear *l, int n, int B) {
    if (B > 1) {
        for (int b = 0; b < B; b++)
            for (int i = 0; i < n; i++)
                in->lanes[((size_t)(b / GROUP) * n + i) * GROUP + b % GROUP] = in->x[(size_t)b * n + i];
    } else if (l->scale) { /* the largest integers whose n products with an int8 sum up in 32 bits */
        const float most = 2.1e9f / (127.0f * n), largest = most < 32767 ? most : 32767;
        float top = 1e-12f;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < n; i++)
            top = larger(top, fabsf(in->x[i]));
        const float factor = largest / top;
        in->scale = top / largest;
        for (int i = 0; i < n; i++)
            in->q[i] = (int16_t)(int32_t)rintf(in->x[i] * factor);
    }
}

/* out (6, 16) = w (6, n) · x (n, 16) */
static void rows_by_lanes(const float *w, const float *x, int n, float out[ROWS][GROUP]) {
    vec sum[ROWS][2] = {{{0}}};
    for (int i = 0; i < n; i++)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++)
                sum[r][v] += w[(size_t)r * n + i] * *(const vec *)(x + (size_t)i * GROUP + v * LANES);
    memcpy(out, sum, sizeof sum);
}

INLINE void put(const Linear *l, float y, int row, int add, float *out) {
    *out = y + (l->bias ? l->bias[row] : 0) + (add ? *out : 0);
}

/* Outputs `from` to `to` - 1 of a linear layer, written or (add) added to out (B, width). */
static void linear(const Linear *l, const Input *in, int n, int B, int from, int to, int add, float *out,
                   int width) {
    const float *floats = l->weight;
    const int8_t *ints8 = l->weight;
    if (B == 1) {
        for (int row = from; row < to; row++) {
            const size_t at = (size_t)row * n;
            put(l, l->scale ? dot_int8(ints8 + at, in->q, n) * l->scale[row] * in->scale
                            : dot_float(floats + at, in->x, n), row, add, out + row);
        }
        return;
    }
    float sums[ROWS][GROUP];
    for (int row = from; row < to; row += ROWS) {
        const int rows = to - row < ROWS ? to - row : ROWS;
        const float *w = floats + (size_t)row * n;
        if (l->scale || rows < ROWS) {
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < n; i++) {
                    const size_t at = (size_t)(row + r) * n + i;
                    in->rows[r * n + i] = l->scale ? ints8[at] * l->scale[row + r] : floats[at];
                }
            w = in->rows;
        }
        for (int first = 0; first < B; first += GROUP) {
            rows_by_lanes(w, in->lanes + (size_t)first * n, n, sums);
            for (int b = first; b < B && b < first + GROUP; b++)
                for (int r = 0; r < rows; r++)
                    put(l, sums[r][b - first], row + r, add, out + (size_t)b * width + row + r);
        }
    }
}

/* exp of a float, after Cephes: 2^k times a polynomial. Unlike expf it can run in vector lanes. */
INLINE float exp_of(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float k = rintf(x * 1.44269504f);
    x = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f, power;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    const int32_t bits = ((int32_t)k + 127) * (1 << 23);
    memcpy(&power, &bits, sizeof power);
    return (p * x * x + x + 1) * power;
}

/* erf within 1.5e-7 (Abramowitz & Stegun 7.1.26). */
INLINE float erf_of(float x) {
    const float t = 1 / (1 + 0.3275911f * fabsf(x));
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
                    + t * 1.061405429f))));
    return copysignf(1 - p * exp_of(-x * x), x);
}

/* The activation, in place on x (n); gate (n) only for SWIGLU. */
static void activate(int kind, float *x, const float *gate, int n) {
    if (kind == GELU) {
#pragma omp simd
        for (int i = 0; i < n; i++)
            x[i] = 0.5f * x[i] * (1 + erf_of(x[i] * 0.707106781f));
    } else if (kind == RELU2) {
#pragma omp simd
        for (int i = 0; i < n; i++)
            x[i] = larger(x[i], 0) * larger(x[i], 0);
    } else {
#pragma omp simd
        for (int i = 0; i < n; i++)
            x[i] = gate[i] / (1 + exp_of(-gate[i])) * x[i];
    }
}

/* out = x (n) over its root mean square, times weight (NULL: 1). layernorm: subtract the mean of x first. */
static void norm(const float *x, const float *weight, int n, float eps, int layernorm, float *out) {
    float mean = 0, square = 0;
    if (layernorm) {
#pragma omp simd reduction(+ : mean)
        for (int i = 0; i < n; i++)
            mean += x[i];
        mean /= n;
    }
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    const float factor = 1 / sqrtf(square / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++)
        out[i] = (x[i] - mean) * factor * (weight ? weight[i] : 1);
}

/* Rotate a query or key head (hs) and divide it by its root mean square, in place, as the model asks. */
static void rotate_and_norm(const Model *m, float *x, int hs, int position) {
    if (m->cos) {
        const float *cos = m->cos + (size_t)position * hs / 2, *sin = m->sin + (size_t)position * hs / 2;
        for (int i = 0; i < hs / 2; i++) {
            const float even = x[2 * i], odd = x[2 * i + 1];
            x[2 * i] = even * cos[i] - odd * sin[i];
            x[2 * i + 1] = even * sin[i] + odd * cos[i];
        }
    }
    if (m->qk_norm)
        norm(x, NULL, hs, m->norm_eps, 0, x);
}

/* y (hs) = softmax(q · keys / √hs) · values, over S keys and values (S, hs); scores: room for S numbers. */
static void attend(const float *q, const float *keys, const float *values, int hs, int S, float *scores,
                   float *y) {
    float top = -INFINITY, total = 0;
    int s;
    for (s = 0; s < S; s++)
        scores[s] = dot_float(keys + (size_t)s * hs, q, hs);
    const float scale = 1 / sqrtf(hs);
#pragma omp simd reduction(max : top)
    for (s = 0; s < S; s++)
        top = larger(top, scores[s]);
#pragma omp simd reduction(+ : total)
    for (s = 0; s < S; s++) {
        scores[s] = exp_of((scores[s] - top) * scale);
        total += scores[s];
    }
    for (int i = 0; i < hs; i++)
        y[i] = 0;
    for (s = 0; s + 4 <= S; s += 4) {
        const float *v = values + (size_t)s * hs;
        const float a = scores[s], b = scores[s + 1], c = scores[s + 2], d = scores[s + 3];
#pragma omp simd
        for (int i = 0; i < hs; i++)
            y[i] += a * v[i] + b * v[hs + i] + c * v[2 * hs + i] + d * v[3 * hs + i];
    }
    for (; s < S; s++)
        for (int i = 0; i < hs; i++)
            y[i] += scores[s] * values[(size_t)s * hs + i];
    for (int i = 0; i < hs; i++)
        y[i] /= total;
}

/* Floats of working memory that each thread has for itself: normed (B, widest), lanes, rows, q, scores. */
static size_t own_size(const Model *m, int B, int length) {
    const size_t widest = m->hidden > m->n_embd ? m->hidden : m->n_embd;
    return widest * (B + in_groups(B) + ROWS + 1) + length;
}

/* Floats of working memory that `decode` needs: x, qkv, y, fc, gate for all threads, and what each has. */
size_t work_size(const Model *m, int B, int length) {
    const size_t hs = m->n_embd / m->n_head, qkv = (m->n_head + 2 * m->n_kv_head) * hs;
    return B * (2 * m->n_embd + qkv + 2 * (size_t)m->hidden) + m->n_threads * own_size(m, B, length);
}

/* The part of n rows that thread `rank` of `size` computes, in whole blocks of ROWS. */
INLINE void share(int n, int rank, int size, int *from, int *to) {
    const int each = (n + ROWS * size - 1) / (ROWS * size) * ROWS;
    *from = each * rank < n ? each * rank : n;
    *to = *from + each < n ? *from + each : n;
}

/* Logits (B, V) after one more token of each of B sequences.

   keys, values: the cache, (n_layer, B, nkv, length, hs), of which `position` tokens are filled; this one's
   are added. ids (B, n_ids): the last tokens, the new one last, as many as prev asks for or fewer.
   work: `work_size` floats, zeroes at first. */
void decode(const Model *m, float *keys, float *values, int length, int position, int B, const int64_t *ids,
            int n_ids, float *work, float *logits) {
    const int C = m->n_embd, hs = C / m->n_head, group = m->n_head / m->n_kv_head, hidden = m->hidden;
    const int qkv_width = (m->n_head + 2 * m->n_kv_head) * hs, widest = hidden > C ? hidden : C;
    float *x = work, *qkv = x + (size_t)B * C, *y = qkv + (size_t)B * qkv_width, *fc = y + (size_t)B * C;
    float *gate = fc + (size_t)B * hidden, *own = gate + (size_t)B * hidden;

#pragma omp parallel num_threads(m->n_threads)
    {
#ifdef _OPENMP
        const int rank = omp_get_thread_num(), size = omp_get_num_threads();
#else
        const int rank = 0, size = 1;
#endif
        float *normed = own + rank * own_size(m, B, length), *lanes = normed + (size_t)B * widest;
        float *rows = lanes + (size_t)in_groups(B) * widest, *q = rows + ROWS * (size_t)widest;
        float *scores = q + widest;
        Input in = {NULL, (int16_t *)q, 0, lanes, rows};
        int from, to;

        share(C, rank, size, &from, &to);
        for (int b = 0; b < B; b++) {
            const int64_t *last = ids + (size_t)(b + 1) * n_ids - 1;
            for (int i = from; i < to; i++) {
                float sum = m->wte[last[0] * C + i];
                for (int before = 1; before < n_ids; before++)
                    sum += m->prev[before - 1][last[-before] * C + i];
                x[(size_t)b * C + i] = sum + (m->wpe ? m->wpe[(size_t)position * C + i] : 0);
            }
        }
#pragma omp barrier
        for (int l = 0; l < m->n_layer; l++) {
            const Layer *layer = m->layers + l;
            for (int b = 0; b < B; b++)
                norm(x + (size_t)b * C, layer->ln_1, C, m->norm_eps, 0, normed + (size_t)b * C);
            in.x = normed;
            prepare(&in, &layer->attn, C, B);
            share(qkv_width, rank, size, &from, &to);
            linear(&layer->attn, &in, C, B, from, to, 0, qkv, qkv_width);
#pragma omp barrier
            for (int unit = rank; unit < B * m->n_kv_head; unit += size) { /* a sequence and key/value head */
                const int b = unit / m->n_kv_head, h = unit % m->n_kv_head;
                float *heads = qkv + (size_t)b * qkv_width; /* nh queries, nkv keys, nkv values, of hs each */
                float *k = heads + (m->n_head + h) * hs, *v = k + m->n_kv_head * hs;
                const size_t at = ((size_t)(l * B + b) * m->n_kv_head + h) * length * hs;
                rotate_and_norm(m, k, hs, position);
                memcpy(keys + at + (size_t)position * hs, k, hs * sizeof *k);
                memcpy(values + at + (size_t)position * hs, v, hs * sizeof *v);
                for (int i = h * group; i < (h + 1) * group; i++) {
                    rotate_and_norm(m, heads + i * hs, hs, position);
                    attend(heads + i * hs, keys + at, values + at, hs, position + 1, scores,
                           y + (size_t)b * C + i * hs);
                }
            }
#pragma omp barrier
            in.x = y;
            prepare(&in, &layer->attn_proj, C, B);
            share(C, rank, size, &from, &to);
            linear(&layer->attn_proj, &in, C, B, from, to, 1, x, C);
#pragma omp barrier
            for (int b = 0; b < B; b++)
                norm(x + (size_t)b * C, layer->ln_2, C, m->norm_eps, 0, normed + (size_t)b * C);
            in.x = normed;
            prepare(&in, &layer->fc, C, B);
            share(hidden, rank, size, &from, &to);
            linear(&layer->fc, &in, C, B, from, to, 0, fc, hidden);
            if (m->activation == SWIGLU)
                linear(&layer->gate, &in, C, B, from, to, 0, gate, hidden);
            for (int b = 0; b < B; b++) {
                const size_t at = (size_t)b * hidden + from;
                activate(m->activation, fc + at, gate + at, to - from);
            }
#pragma omp barrier
            in.x = fc;
            prepare(&in, &layer->mlp_proj, hidden, B);
            share(C, rank, size, &from, &to);
            linear(&layer->mlp_proj, &in, hidden, B, from, to, 1, x, C);
#pragma omp barrier
        }
        for (int b = 0; b < B; b++)
            norm(x + (size_t)b * C, m->ln_f, C, m->layernorm ? 1e-5f : m->norm_eps, m->layernorm,
                 normed + (size_t)b * C);
        in.x = normed;
        prepare(&in, &m->lm_head, C, B);
        share(m->vocab_size, rank, size, &from, &to);
        linear(&m->lm_head, &in, C, B, from, to, 0, logits, m->vocab_size);
    }
}
