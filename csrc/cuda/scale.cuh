// Clips gradients in place. Compiled by nvcc, and by g++ for the emulation, like kernels.cuh.
#pragma once
#include "kernels.cuh"

namespace fused_optim {

// One thread's share of one chunk's gradient. If the factor is 1, no gradient is read or written.
template <class T>
FUSED_HD void scale_chunk(const Tables& t, int64_t row, int64_t chunk, T factor, int thread) {
  if (factor == T(1)) return;
  constexpr int V = kVector<T, kAbsent, 1>, kPart = kAccess / sizeof(T);
  const int64_t address = t.grads[row], begin = chunk * kChunk, left = t.rows[row * kRowWidth + kRowNumel] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  const Stream grad(address, format_of(t.rows[row * kRowWidth + kRowDtypeSignature], kStreamGrad), begin);
  const int vectored = address % kAccess == 0 ? count - count % V : 0;

  for (int piece = 0; piece < vectored; piece += kThreads * V) {
    // Neighbouring threads should access neighbouring 16 bytes. For whole blocks of float32, `gap` makes that possible.
    const bool spread = grad.format == kFloat32 && piece + kThreads * V <= vectored;
    const int gap = spread ? kThreads * kPart : kPart;
    const int first = piece + thread * (spread ? kPart : V);
    if (first >= vectored) break;
    Pack<T, V> pack;
    T x[V];
    load(grad, first, gap, pack);
    unpack(pack, grad.format, x);
    for (int v = 0; v < V; ++v) x[v] *= factor;
    pack_up(x, grad.format, pack);
    store(grad, first, gap, pack);
  }
  for (int element = vectored + thread; element < count; element += kThreads)
    store_one(grad, element, load_one<T>(grad, element) * factor);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(Tables t) {
  const int64_t entry = t.chunk_table[blockIdx.x], row = row_of(entry), chunk = chunk_of(entry);
  if (t.grads[row] == 0) return;
  const double factor = clip_coefficient(t.group_hparams + int64_t{t.group_index[row]} * kGroupWidth, *t.squares, 1.0);
  const bool wide = format_of(t.rows[row * kRowWidth + kRowDtypeSignature], kStreamGrad) == kFloat64;
  each_thread<kThreads>([&](int thread) {
    if (wide) scale_chunk<double>(t, row, chunk, factor, thread);
    else scale_chunk<float>(t, row, chunk, static_cast<float>(factor), thread);
  });
}

template <class Launch>
void launch_scale(const Tables& t, Launch&& launch) {
  launch(scale_kernel, t.chunks, kThreads, t);
}

}  // namespace fused_optim
