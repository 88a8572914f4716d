// The operations between a ResNet's convolutions, in place on channels-last maps (images, pixels, channels) of bfloat16
// or float32: GroupNorm fused with the addition of the shortcut and the ReLU, and the max pooling of the root.
//
// A map is read twice and written once. Statistics are of the differences to the first pixel, in float32 for 64 pixels
// and in double beyond. 32 channels at a time are two of the compiler's portable vectors, in one register or in
// several: of bfloat16 the even and the odd channels, which need no shuffle, of float32 16 and 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>

using std::int64_t;

constexpr int64_t WIDE = 32, HALF = 16;     // channels at once
constexpr int64_t ROWS = 8, FLOATS = 64;  // pixels at once, pixels that a float32 sum is of

using Vector = float __attribute__((vector_size(4 * HALF)));
using Bits = uint32_t __attribute__((vector_size(4 * HALF)));

// A register's part of a vector: GCC compares wider vectors than registers number by number.
#ifdef __AVX512F__
constexpr int64_t REGISTER = 16;
#elif defined(__AVX__)
constexpr int64_t REGISTER = 8;
#else
constexpr int64_t REGISTER = 4;
#endif
using Part = float __attribute__((vector_size(4 * REGISTER)));

template <typename Function>
static inline Vector by_parts(Vector x, Vector y, Function function) {
  Part xs[HALF / REGISTER], ys[HALF / REGISTER];
  std::memcpy(xs, &x, sizeof x);
  std::memcpy(ys, &y, sizeof y);
  for (int64_t part = 0; part < HALF / REGISTER; ++part) xs[part] = function(xs[part], ys[part]);
  std::memcpy(&x, xs, sizeof x);
  return x;
}

struct Bfloat16 { uint16_t bits; };
struct Pair { Vector one, two; };

static int64_t up(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

// Copied by vectors, not by pairs: compilers keep those in registers.
static inline Pair load(const float* from) {
  Pair result;
  std::memcpy(&result.one, from, sizeof(Vector));
  std::memcpy(&result.two, from + HALF, sizeof(Vector));
  return result;
}

static inline Pair load(const Bfloat16* from) {
  Bits both;
  std::memcpy(&both, from, sizeof(Bits));
  return {(Vector)(both << 16), (Vector)(both & 0xffff0000)};
}

static inline void store(float* to, Pair x) {
  std::memcpy(to, &x.one, sizeof(Vector));
  std::memcpy(to + HALF, &x.two, sizeof(Vector));
}

// Rounded to the nearest, ties to even. A NaN of bfloat16 or of arithmetic has zeros in its low bits and stays one.
static inline Bits rounded(Vector x) { return (Bits)x + 0x7fff + (((Bits)x >> 16) & 1); }

static inline void store(Bfloat16* to, Pair x) {
  const Bits both = (rounded(x.one) >> 16) | (rounded(x.two) & 0xffff0000);
  std::memcpy(to, &both, sizeof(Bits));
}

// The first `count` of 32 channels, zeros after them.
template <typename T>
static inline Pair load(const T* from, int64_t count) {
  if (count == WIDE) return load(from);
  T room[WIDE] = {};
  std::copy_n(from, count, room);
  return load(room);
}

template <typename T>
static inline void store(T* to, Pair x, int64_t count) {
  if (count == WIDE) return store(to, x);
  T room[WIDE];
  store(room, x);
  std::copy_n(room, count, to);
}

// Where a channel is among the floats of pairs.
static int64_t place(const float*, int64_t channel) { return channel; }
static int64_t place(const Bfloat16*, int64_t channel) {
  return channel / WIDE * WIDE + channel % 2 * HALF + channel % WIDE / 2;
}

struct Sums { double first, second; };  // of the differences to the first pixel, of their squares

// Adds pixels of an image to the sums of each channel; `floats` holds two float32 sums of each.
template <typename T>
static void add_up(
    const T* x, const T* origin, int64_t pixels, int64_t channels, std::vector<float>& floats, Sums* sums) {
  float *first = floats.data(), *second = first + up(channels);
  for (int64_t from = 0; from < pixels; from += FLOATS) {
    std::fill(floats.begin(), floats.end(), 0.f);
    const int64_t to = std::min(from + FLOATS, pixels);
    for (int64_t at = from; at < to; at += ROWS) {
      const T* rows = x + at * channels;
      const int64_t count = std::min(ROWS, to - at);
      for (int64_t c = 0; c < channels; c += WIDE) {
        const int64_t wide = std::min(WIDE, channels - c);
        const Pair zero = load(origin + c, wide);
        Pair sum = load(first + c), squares = load(second + c);
        const auto add = [&](int64_t row, int64_t wide) {
          const Pair pixel = load(rows + row * channels + c, wide);
          const Vector one = pixel.one - zero.one, two = pixel.two - zero.two;
          sum.one += one, sum.two += two;
          squares.one += one * one, squares.two += two * two;
        };
        if (count == ROWS && wide == WIDE)
          for (int64_t row = 0; row < ROWS; ++row) add(row, WIDE);
        else
          for (int64_t row = 0; row < count; ++row) add(row, wide);
        store(first + c, sum);
        store(second + c, squares);
      }
    }
    for (int64_t c = 0; c < up(channels); ++c) sums[c].first += first[c], sums[c].second += second[c];
  }
}

struct Norm { const float *weight, *bias; double eps; int64_t groups; };
struct Affine { std::vector<float> mean, factor, bias; };  // of each channel, in pairs

template <typename T>
static Affine affine(
    const T* origin, const Sums* sums, int64_t parts, int64_t pixels, int64_t channels, const Norm& norm) {
  const int64_t width = channels / norm.groups, pitch = up(channels);
  std::vector<float> zero(pitch);
  Affine result{zero, zero, zero};
  for (int64_t c = 0; c < channels; c += WIDE) store(&zero[c], load(origin + c, std::min(WIDE, channels - c)), WIDE);
  for (int64_t group = 0; group < channels; group += width) {
    const double base = zero[place(origin, group)];
    double squares = 0, mean = 0, mean_squares = 0;  // means are counted from the base
    for (int64_t c = group; c < group + width; ++c) {
      const int64_t at = place(origin, c);
      double first = 0, second = 0;
      for (int64_t part = 0; part < parts; ++part)
        first += sums[part * pitch + at].first, second += sums[part * pitch + at].second;
      const double offset = first / pixels, from_base = zero[at] - base + offset;
      squares += second - first * offset;
      mean += from_base / width, mean_squares += from_base * from_base;
    }
    const double variance = (squares / pixels + mean_squares) / width - mean * mean;
    const double factor = 1 / std::sqrt((variance < 0 ? 0 : variance) + norm.eps);
    for (int64_t c = group; c < group + width; ++c) {
      const int64_t at = place(origin, c);
      result.mean[at] = base + mean;
      result.factor[at] = norm.weight[c] * factor;
      // the mean rounded to float32: its error goes into the bias
      result.bias[at] = norm.bias[c] + (result.mean[at] - (base + mean)) * result.factor[at];
    }
  }
  return result;
}

static inline Pair normalized(Pair x, const Affine& by, int64_t c) {
  const Pair mean = load(&by.mean[c]), factor = load(&by.factor[c]), bias = load(&by.bias[c]);
  return {(x.one - mean.one) * factor.one + bias.one, (x.two - mean.two) * factor.two + bias.two};
}

enum class Rest { none, added, normalized };

template <Rest REST, typename T>
static void finish(
    T* x, const T* rest, int64_t pixels, int64_t channels, const Affine& own, const Affine& other) {
  const auto relu = [](Vector x) {
    return by_parts(x, Vector{}, [](Part x, Part zero) { return x < zero ? zero : x; });  // NaN is not less, and stays
  };
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, rest += channels) {
    const auto some = [&](int64_t c, int64_t wide) {
      Pair sum = normalized(load(x + c, wide), own, c), added{};
      if (REST == Rest::added) added = load(rest + c, wide);
      if (REST == Rest::normalized) added = normalized(load(rest + c, wide), other, c);
      if (REST != Rest::none) sum.one += added.one, sum.two += added.two;
      store(x + c, {relu(sum.one), relu(sum.two)}, wide);
    };
    int64_t c = 0;
    for (; c + WIDE <= channels; c += WIDE) some(c, WIDE);
    if (c < channels) some(c, channels - c);
  }
}

template <typename T>
static void normalize(
    T* x, const T* rest, const Norm* norms, Rest kind, int64_t images, int64_t pixels, int64_t channels, int threads) {
  const int64_t maps = kind == Rest::normalized ? 2 : 1, pitch = up(channels);
  std::vector<Sums> shared(maps * threads * pitch);
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), alone = images / team * team;
    std::vector<float> floats(2 * pitch);
    // All threads do a part of each of these images, or one thread does all of it.
    const auto image = [&](int64_t at, int64_t parts, int64_t part, std::vector<Sums>& sums) {
      const int64_t from = pixels * part / parts, count = pixels * (part + 1) / parts - from;
      T* to = x + at * pixels * channels;
      const T* other = rest ? rest + at * pixels * channels : to;
      const T* inputs[2] = {to, other};
      for (int64_t map = 0; map < maps; ++map) {
        Sums* own = &sums[(map * parts + part) * pitch];
        std::fill_n(own, pitch, Sums{0, 0});
        add_up(inputs[map] + from * channels, inputs[map], count, channels, floats, own);
      }
      Affine affines[2];
      const auto statistics = [&] {
        for (int64_t map = 0; map < maps; ++map)
          affines[map] = affine(inputs[map], &sums[map * parts * pitch], parts, pixels, channels, norms[map]);
      };
      if (parts > 1) {
#pragma omp barrier
      }
      statistics();
      if (parts > 1) {
#pragma omp barrier
      }
      to += from * channels, other += from * channels;
      if (kind == Rest::none) finish<Rest::none>(to, other, count, channels, affines[0], affines[1]);
      else if (kind == Rest::added) finish<Rest::added>(to, other, count, channels, affines[0], affines[1]);
      else finish<Rest::normalized>(to, other, count, channels, affines[0], affines[1]);
    };
    std::vector<Sums> mine(alone ? maps * pitch : 0);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < alone; ++at) image(at, 1, 0, mine);
    for (int64_t at = alone; at < images; ++at) image(at, team, me, shared);
  }
}

// x becomes relu(norms[0](x) + rest) by kind 1, relu(norms[0](x) + norms[1](rest)) by 2, relu(norms[0](x)) by 0.
extern "C" void group_norm(
    void* x, const void* rest, const Norm* norms, int kind, int64_t images, int64_t pixels, int64_t channels, int half,
    int threads) {
  const auto run = [&](auto* map) {
    using T = std::remove_pointer_t<decltype(map)>;
    normalize<T>(map, static_cast<const T*>(rest), norms, Rest(kind), images, pixels, channels, threads);
  };
  half ? run(static_cast<Bfloat16*>(x)) : run(static_cast<float*>(x));
}

static inline Vector larger(Vector x, Vector most) {
  return by_parts(x, most, [](Part x, Part most) { return (x <= most) | (most != most) ? most : x; });  // NaN stays
}

template <typename T>
static void pool(
    const T* x, T* out, int64_t images, const int64_t* from, const int64_t* to, const int64_t* before,
    int64_t channels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < images * to[0]; ++line) {
    const int64_t first = line % to[0] * 2 - before[0], last = std::min(first + 3, from[0]);
    const T* image = x + line / to[0] * from[0] * from[1] * channels;
    for (int64_t column = 0; column < to[1]; ++column) {
      const int64_t left = column * 2 - before[1], right = std::min(left + 3, from[1]);
      for (int64_t c = 0; c < channels; c += WIDE) {
        const int64_t wide = std::min(WIDE, channels - c);
        Pair most{Vector{} - INFINITY, Vector{} - INFINITY};
        for (int64_t v = std::max<int64_t>(first, 0); v < last; ++v)
          for (int64_t u = std::max<int64_t>(left, 0); u < right; ++u) {
            const Pair next = load(image + (v * from[1] + u) * channels + c, wide);
            most = {larger(next.one, most.one), larger(next.two, most.two)};
          }
        store(out + (line * to[1] + column) * channels + c, most, wide);
      }
    }
  }
}

// 3 x 3 max pooling with stride 2: (images, *from, channels) -> (images, *to, channels), with `before` rows and columns
// of padding at the top and the left.
extern "C" void max_pool(
    const void* x, void* out, int64_t images, const int64_t* from, const int64_t* to, const int64_t* before,
    int64_t channels, int half, int threads) {
  const auto run = [&](auto* map) {
    using T = std::remove_pointer_t<decltype(map)>;
    pool<T>(static_cast<const T*>(x), map, images, from, to, before, channels, threads);
  };
  half ? run(static_cast<Bfloat16*>(out)) : run(static_cast<float*>(out));
}
