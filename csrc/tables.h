// A table describes one step as plain arrays. layout.h has their columns. Walkers read it.
#pragma once
#include <cstdint>

#include "layout.h"

namespace fused_optim {

struct Tables {
  // See TableArrays in fused_optim/engine/layout.py.
  const int64_t* chunk_table;
  const int64_t* rows;
  const int64_t* grads;
  const int64_t* lr;
  const double* group_hparams;
  const int32_t* group_index;
  double* tensor_scalars;   // written by prep, read by the walkers
  const float* grad_scale;  // [1] or null: gradients are divided by it
  const float* found_inf;   // [1] or null: any non-zero value skips the step
  // Null if nothing is summed over whole tensors.
  const int64_t* row_offsets;
  double* partials;
  double* sums;
  double* trust;
  const double* squares;  // [1] or null: sum of the squares of all gradients before grad_scale; asks for clipping
  int64_t chunks;
  int32_t tensors;
  bool packed;  // a stream of some row has a format of formats.h
  bool ema;     // every row has an average of its weights, or none has
};
static_assert(sizeof(Tables) <= 128, "nvcc takes a larger argument apart less well, and all kernels change");

// Whether it is a format of formats.h. These need more than the bits of one array.
FUSED_HD constexpr bool is_packed(Format format) { return format >= kBfloat16Dithered && format <= kAnchored8; }

FUSED_HD constexpr int bytes_of(Format format) {
  return format == kFloat64 ? kBytesFloat64 : format == kFloat32 ? kBytesFloat32 : format == kAnchored8 ? 1 : 2;
}

// Column of `rows` with the address of a stream. Gradients have an array of their own.
FUSED_HD constexpr int address_column(int stream) {
  if (stream == kStreamParam) return kRowParam;
  return stream == kStreamEma ? kRowEma : kRowState0 + stream - kStreamState0;
}

}  // namespace fused_optim
