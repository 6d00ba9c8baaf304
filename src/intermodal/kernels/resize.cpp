// Pillow's resize of 8-bit pictures (libImaging/Resample.c), to the bit: two passes, each a sum of whole numbers with weights of 22 bits
// after the point, rounded to bytes. Several pixels at once, where Pillow takes one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int POINT = 22;
constexpr int PIXELS = LANES / 4;
constexpr int TOGETHER = 4;  // rows for which weights are loaded once

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int32_t four __attribute__((vector_size(16)));

template <class V> static inline V read(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline ints wide(bytes narrow) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepu8_epi32((__m128i)narrow);
#elif defined(__AVX2__)
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&narrow));
#else
    return __builtin_convertvector(__builtin_convertvector(narrow, shorts), ints);
#endif
}

// LANES sums -> bytes.
static inline void round_to(uint8_t* to, ints sum) {
    ints whole = sum >> POINT, most = ints{} + 255;
    whole = whole < 0 ? ints{} : whole;
    whole = whole > most ? most : whole;
    bytes out = __builtin_convertvector(__builtin_convertvector(whole, shorts), bytes);
    std::memcpy(to, &out, LANES);
}

// PIXELS pixels as 4 bytes each, the last of them anything; no byte from `end` on is read.
template <int CHANNELS> static inline bytes pixels(const uint8_t* from, const uint8_t* end) {
    if constexpr (CHANNELS == 4) return read<bytes>(from);
    bytes packed = {};
    if (from + LANES <= end) packed = read<bytes>(from);
    else std::memcpy(&packed, from, 3 * PIXELS);
#ifdef __AVX512F__
    return __builtin_shufflevector(packed, packed, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
#else
    return __builtin_shufflevector(packed, packed, 0, 1, 2, 2, 3, 4, 5, 5);
#endif
}

struct Axis {
    const int32_t *first, *weights;  // (outputs,) where the inputs of an output begin, null where nothing changes; (outputs, taps)
    int64_t taps, outputs;           // of columns: taps are a multiple of 4, and each weight stands there 4 times, once a byte
};

// ROWS rows, `stride` bytes apart -> rows of 4 bytes a pixel.
template <int CHANNELS, int ROWS>
static void columns(const uint8_t* from, const uint8_t* end, int64_t stride, const Axis& axis, uint8_t* to) {
    for (int64_t x = 0; x < axis.outputs; x++) {
        const int32_t* weights = axis.weights + x * axis.taps * 4;
        const uint8_t* first = from + axis.first[x] * CHANNELS;
        ints sum[ROWS] = {};
        for (int64_t tap = 0; tap < axis.taps; tap += PIXELS) {
            ints each = read<ints>(weights + tap * 4);
            for (int row = 0; row < ROWS; row++)
                sum[row] += wide(pixels<CHANNELS>(first + row * stride + tap * CHANNELS, end)) * each;
        }
        four whole[TOGETHER] = {};
        for (int row = 0; row < ROWS; row++) {
            four part[PIXELS];
            std::memcpy(part, &sum[row], sizeof part);
            whole[row] += 1 << (POINT - 1);
            for (int pixel = 0; pixel < PIXELS; pixel++) whole[row] += part[pixel];
        }
        uint8_t out[4 * TOGETHER];
        for (int row = 0; row < TOGETHER; row += PIXELS) round_to(out + 4 * row, read<ints>(whole + row));
        for (int row = 0; row < ROWS; row++) std::memcpy(to + (row * axis.outputs + x) * 4, out + 4 * row, 4);
    }
}

template <int CHANNELS> static void all_columns(const uint8_t* from, int64_t width, int64_t height, const Axis& axis, uint8_t* to) {
    int64_t row = 0, stride = width * CHANNELS, out = axis.outputs * 4;
    const uint8_t* end = from + height * stride;
    for (; row + TOGETHER <= height; row += TOGETHER) columns<CHANNELS, TOGETHER>(from + row * stride, end, stride, axis, to + row * out);
    for (; row < height; row++) columns<CHANNELS, 1>(from + row * stride, end, stride, axis, to + row * out);
}

// Rows of `count` bytes, each from some that follow one another.
static void all_rows(const uint8_t* from, int64_t count, const Axis& axis, uint8_t* to) {
    for (int64_t y = 0; y < axis.outputs; y++, to += count) {
        const uint8_t* row = from + axis.first[y] * count;
        const int32_t* weights = axis.weights + y * axis.taps;
        int64_t at = 0;
        for (; at + LANES <= count; at += LANES) {
            ints sum = ints{} + (1 << (POINT - 1));
            for (int64_t tap = 0; tap < axis.taps; tap++) sum += wide(read<bytes>(row + tap * count + at)) * weights[tap];
            round_to(to + at, sum);
        }
        for (; at < count; at++) {
            int32_t sum = 1 << (POINT - 1);
            for (int64_t tap = 0; tap < axis.taps; tap++) sum += row[tap * count + at] * weights[tap];
            to[at] = std::clamp(sum >> POINT, 0, 255);
        }
    }
}

// A picture (height, width, channels), of 3 or 4 channels -> (down.outputs, across.outputs, 3). Returns whether there was no memory for it.
extern "C" int resize(const uint8_t* from, int64_t channels, int64_t width, int64_t height, const Axis* across, const Axis* down,
                      int64_t down_first, uint8_t* to) try {
    static thread_local std::vector<uint8_t> buffers[2];
    auto pass = [&](bool vertical) {
        if (!(vertical ? down : across)->first) return;
        auto& buffer = buffers[vertical];
        if (vertical) {
            buffer.resize(down->outputs * width * channels);
            all_rows(from, width * channels, *down, buffer.data());
            height = down->outputs;
        } else {
            buffer.resize(height * across->outputs * 4);
            (channels == 3 ? all_columns<3> : all_columns<4>)(from, width, height, *across, buffer.data());
            width = across->outputs, channels = 4;
        }
        from = buffer.data();
    };
    pass(down_first);
    pass(!down_first);
    for (int64_t pixel = 0; pixel < width * height; pixel++) std::memcpy(to + pixel * 3, from + pixel * channels, 3);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
