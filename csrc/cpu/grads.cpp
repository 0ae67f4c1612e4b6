// The CPU walker's passes over gradients alone: their norm, and clipping in place.
#include "grads.h"

#include "walk.h"

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kLanes = 32;  // independent sums: with one vector each addition would wait for the one before
constexpr int kRun = 8;     // squares that a lane sums in float32 before it adds them to a float64

template <class G>
double squares_in_double(const G* x, int count) {
  double part[kLanes] = {}, total = 0.0;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double wide = widen(x[i + lane]);
      part[lane] += wide * wide;
    }
  }
  for (; i < count; ++i) {
    const double wide = widen(x[i]);
    total += wide * wide;
  }
  for (double sum : part) total += sum;
  return total;
}

// Adds one run of every lane. The loop is unrolled so that `sum` stays in registers.
template <class G>
void add_squares(const G* x, double (&part)[kLanes]) {
  float sum[kLanes] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kLanes * kRun; i += kLanes) {
    prefetch_ahead(x + i, kLanes);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = fma(widen(x[i + lane]), widen(x[i + lane]), sum[lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane) part[lane] += sum[lane];
}

void add_squares(const BFloat16* x, double (&part)[kLanes]) {
  const Pair* pairs = reinterpret_cast<const Pair*>(x);  // auto would drop Pair's alignment attribute
  float sum[kLanes] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kLanes * kRun / 2; i += kLanes) {
    prefetch_ahead(pairs + i, kLanes);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Pair pair = pairs[i + lane];
      sum[lane] = fma(odd(pair), odd(pair), fma(even(pair), even(pair), sum[lane]));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) part[lane] += sum[lane];
}

#ifdef __F16C__
void add_squares(const Float16* x, double (&part)[kLanes]) {
  float sum[kLanes];
  for (int lane = 0; lane < kLanes; lane += 8) {
    __m256 eight = _mm256_setzero_ps();
    for (int i = lane; i < kLanes * kRun; i += kLanes) {
      const __m256 wide = widen_eight(x + i);
      eight = _mm256_fmadd_ps(wide, wide, eight);
    }
    _mm256_storeu_ps(sum + lane, eight);
  }
  for (int lane = 0; lane < kLanes; ++lane) part[lane] += sum[lane];
}
#endif

// Sums mostly in float32, which takes half the instructions. Each run has kRun roundings of relative size 2**-24, which
// do not matter for a norm in float32.
template <class G>
double squares_in(const G* x, int count) {
  const int done = count - count % (kLanes * kRun);
  double part[kLanes] = {}, total = 0.0;
  for (int i = 0; i < done; i += kLanes * kRun) add_squares(x + i, part);
  for (double sum : part) total += sum;
  // Squares can overflow or underflow float32. Then the sum is computed again in float64.
  if (!(total > 1e-27 && total < 1e38)) total = squares_in_double(x, done);
  return total + squares_in_double(x + done, count - done);
}

// The sum of the squares of one chunk's gradient.
double squares_of(const Tables& t, int64_t entry) {
  const int64_t row = row_of(entry), begin = chunk_of(entry) * kChunk;
  const double max_norm = t.group_hparams[int64_t{t.group_index[row]} * kGroupWidth + kGroupMaxNorm];
  if (t.grads[row] == 0 || max_norm == 0.0) return 0.0;
  const int64_t* columns = t.rows + row * kRowWidth;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, columns[kRowNumel] - begin));
  const Stream grad = Stream::of_grad(columns, t.grads[row]);
  const double counted = max_norm > 0.0 ? 1.0 : 0.0;  // 0 * inf and 0 * NaN are NaN, so non-finite values count
  if (grad.format == kFloat64)
    return squares_in_double(reinterpret_cast<const double*>(grad.at(begin)), count) * counted;
  double total = 0.0;
  visit_format(grad.format,
               [&](auto type) { total = squares_in(reinterpret_cast<const decltype(type)*>(grad.at(begin)), count); });
  return total * counted;
}

// If the factor is 1, nothing is read or written.
template <class T, class G>
void scale_block(T factor, G* grad, int count) {
  if (factor == T(1)) return;
#pragma omp simd
  for (int i = 0; i < count; ++i) narrow(widen(grad[i]) * factor, grad[i]);
}

#ifdef __F16C__
void scale_block(float factor, Float16* grad, int count) {
  if (factor == 1.0f) return;
  int i = 0;
  for (; i + 8 <= count; i += 8) narrow_eight(_mm256_mul_ps(widen_eight(grad + i), _mm256_set1_ps(factor)), grad + i);
  scale_block<float, Float16>(factor, grad + i, count - i);
}
#endif

// Clips the gradient of one chunk in place.
void scale_chunk(const Tables& t, int64_t entry) {
  const int64_t row = row_of(entry), begin = chunk_of(entry) * kChunk;
  if (t.grads[row] == 0) return;
  const double factor = clip_coefficient(t.group_hparams + int64_t{t.group_index[row]} * kGroupWidth, *t.squares, 1.0);
  const int64_t* columns = t.rows + row * kRowWidth;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, columns[kRowNumel] - begin));
  const Stream grad = Stream::of_grad(columns, t.grads[row]);
  if (grad.format == kFloat64) return scale_block(factor, reinterpret_cast<double*>(grad.at(begin)), count);
  visit_format(grad.format, [&](auto type) {
    scale_block(static_cast<float>(factor), reinterpret_cast<decltype(type)*>(grad.at(begin)), count);
  });
}

}  // namespace

double squares(const Tables& t, int threads) {
  walk_chunks(t, threads, Order::kForward, [](const Tables& t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) t.partials[i] = squares_of(t, t.chunk_table[i]);
  });
  double total = 0.0;
  for (int64_t i = 0; i < t.chunks; ++i) total += t.partials[i];  // in a fixed order, so the sum is reproducible
  return total;
}

void scale(const Tables& t, int threads) {
  walk_chunks(t, threads, Order::kBackward, [](const Tables& t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) scale_chunk(t, t.chunk_table[i]);
  });
}

}  // namespace fused_optim::FUSED_ISA
