// One decoding step of the decoder (models/decoder.py) on the CPU: one new token of each of some conversations, all layers in one call.
//
// The weights are read where they stand, once for all conversations. Sums are float32; what PyTorch keeps in bf16 between two operators
// is rounded to bf16 here too. How a row is summed does not depend on how many rows there are.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = 8;       // a weight that was read is multiplied with so many rows
constexpr int BLOCK = 8;      // outputs of a product that a thread takes at a time
constexpr int PIECE = 256;    // keys that a thread takes at a time

struct bf16 {
    uint16_t bits;
};
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <class V, class T> static inline V read(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
static inline vec load(const float* from) { return read<vec>(from); }
static inline vec load(const bf16* from) { return (vec)(__builtin_convertvector(read<halves>(from), words) << 16); }
static inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }

// Between a number and how it is kept; to bf16 it is the nearest, and of two the even one.
static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    return read<float>(&bits);
}
static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) {
    uint32_t bits = read<uint32_t>(&x);
    to.bits = x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
template <class T> static inline float rounded(float x) {
    T kept;
    put(kept, x);
    return wide(kept);
}

// One instruction's part of a product: so many numbers of each, LANES sums. `Kept` is how what is multiplied with weights is kept for it.
template <class A, class B> static inline vec plus_product(vec sum, const A* a, const B* b) { return sum + load(a) * load(b); }
template <class A, class B> static inline vec plus_half(vec sum, const A*, const B*) { return sum; }
#ifdef __AVX512BF16__
template <class T> using Kept = T;
template <class T> constexpr int LOT = std::is_same_v<T, bf16> ? 2 * LANES : LANES;
static inline vec plus_pairs(vec sum, __m512i a, __m512i b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
static inline vec plus_product(vec sum, const bf16* a, const bf16* b) {
    return plus_pairs(sum, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
static inline vec plus_half(vec sum, const bf16* a, const bf16* b) {
    return plus_pairs(sum, _mm512_maskz_loadu_epi32(0xFF, a), _mm512_maskz_loadu_epi32(0xFF, b));
}
#else
template <class T> using Kept = float;
template <class T> constexpr int LOT = LANES;
#endif

// Lanes of two vectors by blocks of `h`: the first (or second) block of every pair, from a and from b in turn.
template <int h, bool second, int... i> static inline vec pick(vec a, vec b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, ((i / h % 2 ? LANES + i - h : i) + second * h)...);
}
template <int h = LANES / 2> static inline vec sums(vec (&v)[LANES]) {  // lane i: the sum of v[i]
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
    for (int i = 0; i < h; i++) v[i] = pick<h, false>(v[i], v[i + h], lanes) + pick<h, true>(v[i], v[i + h], lanes);
    if constexpr (h > 1) return sums<h / 2>(v);
    return v[0];
}
static inline float sum(vec one) {
    vec v[LANES] = {one};
    return sums(v)[0];
}

// One row (width,) times each of R rows (R, width) -> out (R,). Widths are multiples of 16. One weight row at a time: processors fetch ahead
// what is read row after row, and not what is read in several rows at once.
template <int LOT, int R, class A, class B> static inline void dots(const A* one, const B* rows, int64_t width, float* out) {
    vec sum[R] = {}, all[LANES] = {};
    int64_t k = 0;
    for (; k + LOT <= width; k += LOT)
        for (int r = 0; r < R; r++) sum[r] = plus_product(sum[r], one + k, rows + r * width + k);
    if (LOT > 16 && k < width)
        for (int r = 0; r < R; r++) sum[r] = plus_half(sum[r], one + k, rows + r * width + k);
    std::copy(sum, sum + R, all);
    vec out_R = sums(all);
    std::memcpy(out, &out_R, 4 * R);
}

// `outs` outputs of R rows -> out[output * R + row].
template <class T, int R> static void block(const T* w, const Kept<T>* x, int64_t width, int64_t outs, float* out) {
    for (int64_t o = 0; o < outs; o++) dots<LOT<T>, R>(w + o * width, x, width, out + o * R);
}

struct Linear {
    const void *weight, *bias;  // (out, in), (out,) or null
    int64_t in, out;
};

// x (rows, in) -> then(row, output, value) of each, in a parallel region; the threads meet at the end.
template <class T, class Then> static inline void product(const Linear& layer, const Kept<T>* x, int64_t rows, Then then) {
    static constexpr decltype(&block<T, 1>) blocks[] = {block<T, 1>, block<T, 2>, block<T, 3>, block<T, 4>,
                                                        block<T, 5>, block<T, 6>, block<T, 7>, block<T, 8>};
    const T *weight = (const T*)layer.weight, *bias = (const T*)layer.bias;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (layer.out + BLOCK - 1) / BLOCK; b++) {
        int64_t first = b * BLOCK, outs = std::min<int64_t>(BLOCK, layer.out - first);
        float values[BLOCK * ROWS];
        for (int64_t row = 0; row < rows; row += ROWS) {
            int64_t some = std::min<int64_t>(ROWS, rows - row);
            blocks[some - 1](weight + first * layer.in, x + row * layer.in, layer.in, outs, values);
            for (int64_t r = 0; r < some; r++)
                for (int64_t o = 0; o < outs; o++) {
                    float value = values[o * some + r];
                    then(row + r, first + o, rounded<T>(bias ? value + wide(bias[first + o]) : value));
                }
        }
    }
}

// Of numbers up to 0, within 2 units in the last place; 0 below -87. Source of the polynomial: Cephes, `expf.c`.
static inline vec exponential(vec x) {
    words small = (words)(x < -87.0f);
    vec n = x * 1.44269504f + 12582912.0f;  // to a whole number, which then stands in the low bits
    words exponent = (words)n << 23;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f, p = vec{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    return (vec)(((words)(p * r * r + r + 1.0f) + exponent) & ~small);
}

// nn.layers.RMSNorm of one row, rounded where it rounds.
template <class T, class To> static void rms_norm(const float* x, const T* weight, int64_t width, float eps, To* out) {
    vec squares = {};
    for (int64_t k = 0; k < width; k += LANES) squares += load(x + k) * load(x + k);
    float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
    for (int64_t k = 0; k < width; k++) put(out[k], rounded<T>(rounded<T>(x[k] * scale) * wide(weight[k])));
}

// models.decoder.HeadLayerNorm of one head, with its eps.
template <class T> static void layer_norm(float* x, const T* weight, const T* bias, int64_t width) {
    float mean = 0, variance = 0;
    for (int64_t k = 0; k < width; k++) mean += x[k] / width;
    for (int64_t k = 0; k < width; k++) variance += (x[k] - mean) * (x[k] - mean) / width;
    float scale = 1.0f / std::sqrt(variance + 1e-5f);
    for (int64_t k = 0; k < width; k++)
        x[k] = rounded<T>(rounded<T>(rounded<T>((x[k] - mean) * scale) * wide(weight[k])) + wide(bias[k]));
}

// nn.rope.rotate of one head.
template <class T> static void rotate(float* x, const T* cos, const T* sin, int64_t width) {
    int64_t half = width / 2;
    for (int64_t k = 0; k < half; k++) {
        float a = x[k], b = x[k + half];
        x[k] = rounded<T>(rounded<T>(a * wide(cos[k])) + b * wide(sin[k]));
        x[k + half] = rounded<T>(rounded<T>(b * wide(cos[k + half])) + a * wide(sin[k + half]));
    }
}

// One piece of the keys, for the `group` query heads that share them. Of each: the sum of the values by their weights (head,), the largest
// score, the sum of the weights.
template <class T>
static void attend(const Kept<T>* q, const T* keys, const T* values, int64_t count, int64_t group, int64_t head, float* out) {
    const float scale = 1.0f / std::sqrt((float)head);
    float weights[PIECE];
    for (int64_t g = 0; g < group; g++, q += head, out += head + 2) {
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) dots<LOT<T>, LANES>(q, keys + j * head, head, weights + j);
        for (; j < count; j++) dots<LOT<T>, 1>(q, keys + j * head, head, weights + j);
        float most = -INFINITY;
        for (j = 0; j < count; j++) most = std::max(most, weights[j] *= scale);
        for (; j % LANES; j++) weights[j] = -INFINITY;
        float from = most == -INFINITY ? 0 : most;  // a piece that weighs nothing
        vec total = {};
        for (j = 0; j < count; j += LANES) {
            vec e = exponential(load(weights + j) - from);
            total += e;
            store(weights + j, e);
        }
        for (int64_t k = 0; k < head; k += LANES) {
            vec acc = {};
            for (j = 0; j < count; j++) acc += weights[j] * load(values + j * head + k);
            store(out + k, acc);
        }
        out[head] = most;
        out[head + 1] = sum(total);
    }
}

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const void *input_norm, *mlp_norm, *q_norm, *q_norm_bias, *k_norm, *k_norm_bias;
};

struct Step {
    int64_t rows, width, heads, kv_heads, head, mlp_width, depth, swin, slots, capacity, most, threads;
    double eps;
    const int64_t *slot, *total;  // (rows,): where a conversation's keys stand, and how many they are with the new one
    const void *x, *cos, *sin;    // (rows, width) embeddings; (rows, head) tables of nn.rope
    void* store;                  // nn.cache.Cache.store
    const Layer* layers;          // (depth,)
    const void* norm;
    Linear output;
    float* scores;                // (rows, output.out)
};

// A step under way. All methods but the constructor are called by every thread of a parallel region, which share the loops in them.
template <class T> struct Run {
    const Step& s;
    const int64_t N = s.rows, D = s.width, H = s.heads, G = s.kv_heads, K = s.head, M = s.mlp_width, all = H + 2 * G;
    const int64_t pieces = (s.most + PIECE - 1) / PIECE;
    float *x, *heads, *gate, *up, *parts;
    Kept<T> *normed, *queries, *seen, *inner;

    explicit Run(const Step& step) : s(step) {
        static thread_local std::vector<char> memory;  // at least the nine arrays below, each from the next cache line on
        memory.resize(std::max<size_t>(memory.size(), 4 * N * (3 * D + all * K + 2 * H * K + 3 * M + H * pieces * (K + 2)) + 64 * 9));
        char* free = memory.data();
        auto room = [&]<class U>(U*& array, int64_t count) {  // by whole cache lines
            array = (U*)(((uintptr_t)free + 63) / 64 * 64);
            free = (char*)(array + count);
        };
        room(x, N * D), room(normed, N * D), room(heads, N * std::max(all * K, D)), room(queries, N * H * K), room(seen, N * H * K);
        room(gate, N * M), room(up, N * M), room(inner, N * M), room(parts, N * H * pieces * (K + 2));
    }

    void whole() {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * D; i++) x[i] = wide(((const T*)s.x)[i]);
        for (int64_t index = 0; index < s.depth; index++) {
            const Layer& layer = s.layers[index];
            read_branch(layer.input_norm);
            product<T>(layer.q, normed, N, to(heads, all * K));
            product<T>(layer.k, normed, N, to(heads + H * K, all * K));
            product<T>(layer.v, normed, N, to(heads + (H + G) * K, all * K));
            place(layer, index);
            attention(index);
            add_branch(layer.o, seen, layer.input_norm);
            read_branch(layer.mlp_norm);
            product<T>(layer.gate, normed, N, to(gate, M));
            product<T>(layer.up, normed, N, to(up, M));
            activate();
            add_branch(layer.down, inner, layer.mlp_norm);
        }
        norm(s.norm);
        product<T>(s.output, normed, N, to(s.scores, s.output.out));
    }

    static auto to(float* out, int64_t stride) {
        return [=](int64_t row, int64_t o, float value) { out[row * stride + o] = value; };
    }

    // Keys of a head from a place on; its values are those of G heads later.
    T* stored(int64_t index, int64_t row, int64_t head, int64_t place) const {
        return (T*)s.store + (((index * s.slots + s.slot[row]) * 2 * G + head) * s.capacity + place) * K;
    }

    // What `attend` says of a piece: of the first of its heads, which follow one another.
    float* part(int64_t row, int64_t piece, int64_t head) const { return parts + ((row * pieces + piece) * H + head) * (K + 2); }

    void norm(const void* weight) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N; row++) rms_norm(x + row * D, (const T*)weight, D, s.eps, normed + row * D);
    }

    // What a branch reads: x normed, or as it is (swin).
    void read_branch(const void* weight) {
        if (!s.swin) return norm(weight);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * D; i++) put(normed[i], x[i]);
    }

    // What a branch gives, onto x: as it is, or normed (swin).
    void add_branch(const Linear& last, const Kept<T>* in, const void* weight) {
        auto add = [&](int64_t row, int64_t o, float value) { x[row * D + o] = rounded<T>(x[row * D + o] + value); };
        if (!s.swin) return product<T>(last, in, N, add);
        product<T>(last, in, N, to(heads, D));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N; row++) {
            rms_norm(heads + row * D, (const T*)weight, D, s.eps, heads + row * D);
            for (int64_t k = 0; k < D; k++) add(row, k, heads[row * D + k]);
        }
    }

    // Queries and keys normed and turned; keys and values into the cache.
    void place(const Layer& layer, int64_t index) {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < N * all; at++) {
            int64_t row = at / all, head = at % all, of = head < H ? head : head - H;
            float* from = heads + at * K;
            if (head < H + G) {
                const T* weight = (const T*)(head < H ? layer.q_norm : layer.k_norm);
                const T* bias = (const T*)(head < H ? layer.q_norm_bias : layer.k_norm_bias);
                if (bias) layer_norm(from, weight + of * K, bias + of * K, K);
                else if (weight) rms_norm(from, weight, K, s.eps, from);
                rotate(from, (const T*)s.cos + row * K, (const T*)s.sin + row * K, K);
            }
            if (head < H)
                for (int64_t k = 0; k < K; k++) put(queries[(row * H + head) * K + k], from[k]);
            else
                for (int64_t k = 0; k < K; k++) put(stored(index, row, of, s.total[row] - 1)[k], from[k]);
        }
    }

    void attention(int64_t index) {
        const int64_t group = H / G;
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t row = 0; row < N; row++)
            for (int64_t g = 0; g < G; g++)
                for (int64_t piece = 0; piece < pieces; piece++) {
                    int64_t first = piece * PIECE, count = std::min<int64_t>(PIECE, s.total[row] - first);
                    if (count > 0)
                        attend<T>(queries + (row * H + g * group) * K, stored(index, row, g, first), stored(index, row, G + g, first),
                                  count, group, K, part(row, piece, g * group));
                }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < N * H; at++) {
            int64_t row = at / H, head = at % H, own = (s.total[row] + PIECE - 1) / PIECE;
            float most = -INFINITY, total = 0, *sum = heads + at * K;
            for (int64_t piece = 0; piece < own; piece++) most = std::max(most, part(row, piece, head)[K]);
            std::fill(sum, sum + K, 0.0f);
            for (int64_t piece = 0; piece < own; piece++) {
                const float* from = part(row, piece, head);
                float share = std::exp(from[K] - most);
                total += share * from[K + 1];
                for (int64_t k = 0; k < K; k++) sum[k] += share * from[k];
            }
            for (int64_t k = 0; k < K; k++) put(seen[at * K + k], rounded<T>(sum[k] / total));
        }
    }

    void activate() {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * M; i += LANES) {
            vec g = load(gate + i), e = exponential(g < 0 ? g : -g), silu = g * (g < 0 ? e : vec{} + 1.0f) / (1.0f + e);
            for (int64_t j = 0; j < LANES; j++) put(inner[i + j], rounded<T>(rounded<T>(silu[j]) * up[i + j]));
        }
    }
};

// Whether there was no memory for it.
template <class T> static int run(const Step& step) try {
    Run<T> run(step);
#pragma omp parallel num_threads(step.threads)
    run.whole();
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" int decode_float32(const Step* step) { return run<float>(*step); }
extern "C" int decode_bfloat16(const Step* step) { return run<bf16>(*step); }
