// The table: everything that describes one step, as plain arrays. Mirrors fused_optim/engine/table.py; read by the CPU
// and the CUDA walker.
#pragma once
#include <cstdint>

namespace fused_optim {

constexpr int kChunk = 4096;     // elements of one tensor that one program (GPU) or one loop turn (CPU) handles
constexpr int kShare = 4096;     // numbers that one block adds up where the norm of all gradients is taken on a GPU
constexpr int kRowWidth = 8;     // int64 columns of `rows`
constexpr int kRawWidth = 17;    // float64 columns of `raw`
constexpr int kHyperWidth = 16;  // float64 columns of `hyper`
constexpr int kMaxStates = 3;

enum RowColumn { kNumel, kParam, kStep, kSignature, kFirstState, kEma = kFirstState + kMaxStates };

enum RawColumn {
  kLr,
  kBeta1,
  kBeta2,
  kEps,
  kWeightDecay,
  kDecoupled,
  kMaximize,
  kRawA,
  kRawB,
  kLrReference,  // decoupled decay is lr / lr_reference * weight_decay / sqrt(decay_period): torch's where both are 1
  kDecayPeriod,
  kMaxNorm,  // of all gradients together; 0: this group is neither clipped nor part of that norm; below 0: neither, but
             // what is not finite in it makes the norm NaN
  kClipEps,
  kTrustLow,  // bounds of the trust ratio
  kTrustHigh,
  kTrustAlways,  // where there is no weight decay, too
  kEmaDecay      // what an average of the weights keeps of itself at each step
};

constexpr int64_t kEmpty = 16;  // stands in `grads` for the address of a gradient without elements, which is null

constexpr int kSkip =
    11;  // column of `hyper`: 1 where this tensor sits the step out, and the row's other columns mean nothing

// Dtypes of one row, a nibble each: param, grad, then its states; kAbsent ends the list. kEmaStream is the average's.
enum Dtype { kFloat32, kBFloat16, kFloat16, kFloat64, kAbsent = 15 };
constexpr int kEmaStream = 6;
constexpr int64_t kEmaBegun = 1 << 28;  // beside them: the average is older than the table

struct Tables {
  const int64_t* desc;   // [chunks]  chunk << 32 | row << 8 | kind << 1 | slow; rows in order, and of each its chunks
  const int64_t* rows;   // [tensors, kRowWidth]
  const int64_t* grads;  // [tensors]  address of the gradient, 0 where there is none: that tensor sits this step out
  const int64_t* lr;     // [groups]  address of a device lr tensor (lowest bit set: float64, else float32), 0: use raw
  const double* raw;     // [groups, kRawWidth]
  const int32_t* group;  // [tensors]
  double* hyper;         // [tensors, kHyperWidth]  written by prep, read by the walkers
  const float* grad_scale;  // [1] or null: gradients are divided by it
  const float* found_inf;   // [1] or null: any non-zero value skips the step
  // Only where something is summed over whole tensors; null otherwise.
  const int64_t* spans;   // [tensors + 1]  row r has the chunks desc[spans[r]] up to desc[spans[r + 1]]
  double* partials;       // [chunks, 2]  what a pass sums over each chunk. Without a trust ratio [chunks + shares]: the
                          // norm of all gradients takes [chunks], and then, on GPUs, the sums of shares (kShare) of it
  double* sums;           // [tensors, 2]  squares of param and update, summed over each tensor
  double* trust;          // [tensors]  trust ratios
  const double* squares;  // [1] or null: sum of the squares of all gradients before grad_scale; asks for clipping
  int64_t chunks;
  int32_t tensors;
  bool ema;  // every row has an average of its weights; else none has
};
static_assert(sizeof(Tables) <= 128, "nvcc takes a larger argument apart less well, and all kernels change");

}  // namespace fused_optim
