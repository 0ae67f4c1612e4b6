// Made by csrc/make_layout.py from fused_optim/engine/layout.py; a test fails where it is not current. Do not edit it.
// clang-format off
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ __forceinline__
#else
#define FUSED_HD inline __attribute__((always_inline))
#endif

namespace fused_optim {

constexpr int kChunk = 4096;  // elements of one tensor that one program (GPU) or one loop turn (CPU) handles
constexpr int kShare = 4096;  // numbers that one GPU block sums for the norm of all gradients
constexpr int kAlignment = 16;  // bytes of the widest access
constexpr int kMaxStates = 4;  // of one tensor
constexpr int kMaxRunning = 3;  // running scalars of one tensor: two of the rule, and the largest lr
constexpr int64_t kEmpty = 16;  // in `grads`: replaces the address of a gradient without elements, which is null
constexpr int kSignatureFieldBits = 4;  // of a code in a packed signature
constexpr int kAbsent = 15;  // the code of a missing stream; it also ends the list of states
constexpr int64_t kEmaBegun = 4294967296;
constexpr int kEntryUnalignedBits = 1;  // set if a written tensor does not begin at a multiple of ALIGNMENT
constexpr int kEntrySignatureBits = 7;  // number of the tensor's dtype signature, in the order of Table.dtype_signatures
constexpr int kEntryRowBits = 24;
constexpr int kEntrySignatureShift = 1;
constexpr int kEntryRowShift = 8;
constexpr int kEntryChunkShift = 32;  // the chunk's number within its tensor has the remaining bits
constexpr int kBytesFloat32 = 4;
constexpr int kBytesBfloat16 = 2;
constexpr int kBytesFloat16 = 2;
constexpr int kBytesFloat64 = 8;
constexpr int kBytesBfloat16Dithered = 2;
constexpr int kBytesSplit16 = 2;
constexpr int kBytesSplit8 = 2;
constexpr int kBytesE8m8 = 2;
constexpr int kBytesAnchored8 = 1;
constexpr int kStreamParam = 0;
constexpr int kStreamGrad = 1;
constexpr int kStreamState0 = 2;
constexpr int kStreamEma = 7;
constexpr int kRowNumel = 0;  // elements; a complex tensor has two for each of its own
constexpr int kRowParam = 1;  // address
constexpr int kRowParamLow = 2;  // address of the lower halves of the param, if its format has them
constexpr int kRowStep = 3;  // address of the number of updates, float32
constexpr int kRowDtypeSignature = 4;  // formats of the tensor's streams and its flags, packed: see `packed_signature`
constexpr int kRowState0 = 5;  // addresses of the states, in the order of the rule
constexpr int kRowState1 = 6;
constexpr int kRowState2 = 7;
constexpr int kRowState3 = 8;
constexpr int kRowEma = 9;  // address of the moving average of the weights
constexpr int kRowFirstElement = 10;  // index of the tensor's first element in the whole param
constexpr int kRowAnchor = 11;  // exponent of the anchors of a state in ANCHORED8
constexpr int kRowRunning0 = 12;  // addresses of the running scalars, float32: those of the rule in its order, then the largest lr
constexpr int kRowRunning1 = 13;
constexpr int kRowRunning2 = 14;
constexpr int kRowWidth = 15;
constexpr int kGroupLr = 0;
constexpr int kGroupBeta1 = 1;
constexpr int kGroupBeta2 = 2;
constexpr int kGroupBeta3 = 3;  // of rules with three averages
constexpr int kGroupEps = 4;
constexpr int kGroupWeightDecay = 5;
constexpr int kGroupDecoupled = 6;  // whether weight decay is decoupled from the gradient
constexpr int kGroupMaximize = 7;
constexpr int kGroupLrReference = 8;  // decoupled decay is lr / lr_reference * weight_decay / sqrt(decay_period)
constexpr int kGroupDecayPeriod = 9;
constexpr int kGroupFirstDecay = 10;  // the first step of a param that has decoupled decay
constexpr int kGroupCautiousDecay = 11;  // whether decoupled decay leaves out elements that the update moves away from 0
constexpr int kGroupNoProx = 12;  // 0: decoupled decay divides by 1 + decay after the update
constexpr int kGroupMaxNorm = 13;  // of all gradients; 0: not clipped, not in the norm; < 0: neither, but NaN and inf still show
constexpr int kGroupClipEps = 14;  // added to the norm
constexpr int kGroupTrustLow = 15;  // bounds of the trust ratio
constexpr int kGroupTrustHigh = 16;
constexpr int kGroupTrustAlways = 17;  // whether the trust ratio is also used without weight decay
constexpr int kGroupEmaDecay = 18;  // share that a moving average of the weights keeps at each step
constexpr int kGroupOptionA = 19;  // the rule's own options
constexpr int kGroupOptionB = 20;
constexpr int kGroupOptionC = 21;
constexpr int kGroupOptionD = 22;
constexpr int kGroupWidth = 23;
constexpr int kScalarLr = 0;
constexpr int kScalarEps = 1;
constexpr int kScalarWeight1 = 2;  // 1 - beta1
constexpr int kScalarWeight2 = 3;  // 1 - beta2
constexpr int kScalarSmallBeta1 = 4;  // beta1 if it is below 0.5, otherwise 0
constexpr int kScalarSmallBeta2 = 5;  // beta2 if it is below 0.5, otherwise 0
constexpr int kScalarStepSize = 6;  // lr / (1 - beta1**step)
constexpr int kScalarDebias = 7;  // 1 / (1 - beta1**step)
constexpr int kScalarDenomScale = 8;  // 1 / sqrt(1 - beta2**step)
constexpr int kScalarGradFactor = 9;  // multiplies the gradient: 1 / grad_scale, the clip coefficient, the sign of maximize
constexpr int kScalarL2 = 10;  // weight decay that is added to the gradient
constexpr int kScalarDecay = 11;  // decoupled weight decay, multiplied by lr unless the rule has a trust ratio
constexpr int kScalarCautiousDecay = 12;  // the group's
constexpr int kScalarEmaWeight = 13;  // weight of the new param in the moving average of the weights
constexpr int kScalarSkip = 14;  // 1: this tensor is not updated, and the other columns have no meaning
constexpr int kScalarOwnA = 15;  // results of the rule's function `scalars`
constexpr int kScalarOwnB = 16;
constexpr int kScalarOwnC = 17;
constexpr int kScalarOwnD = 18;
constexpr int kScalarOwnE = 19;
constexpr int kScalarOwnF = 20;
constexpr int kScalarWidth = 21;
constexpr int kArrayChunkTable = 0;  // int64 [chunks]: see `chunk_entry`; ordered by tensor, then by chunk
constexpr int kArrayRows = 1;  // int64 [tensors, RowFields]
constexpr int kArrayGrads = 2;  // int64 [tensors]: address of the gradient; 0: no gradient, and no update
constexpr int kArrayLr = 3;  // int64 [groups]: address of a device lr tensor (lowest bit set: float64, else float32), or 0
constexpr int kArrayGroupHparams = 4;  // float64 [groups, GroupHparams]
constexpr int kArrayGroupIndex = 5;  // int32 [tensors]: the row of group_hparams
constexpr int kArrayTensorScalars = 6;  // float64 [tensors, TensorScalars]
constexpr int kArrayRowOffsets = 7;  // int64 [tensors + 1]: tensor t has the entries row_offsets[t] up to row_offsets[t + 1]
constexpr int kArrayPartials = 8;  // float64 [chunks, 2]: sums over each chunk; [chunks + shares] for the norm of all gradients
constexpr int kArraySums = 9;  // float64 [tensors, 2]: squares of param and update
constexpr int kArrayTrust = 10;  // float64 [tensors]: trust ratios
constexpr int kArrayWidth = 11;

// How a stream stores its values.
enum Format { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBfloat16Dithered = 4, kSplit16 = 5, kSplit8 = 6, kE8m8 = 7, kAnchored8 = 8 };

// `group_hparams`, float64 [groups, ...]: the hyperparameters of a param group. A default is used if the group has no such option.
struct GroupHparams {
  double lr;
  double beta1;
  double beta2;
  double beta3;  // of rules with three averages
  double eps;
  double weight_decay;
  double decoupled;  // whether weight decay is decoupled from the gradient
  double maximize;
  double lr_reference;  // decoupled decay is lr / lr_reference * weight_decay / sqrt(decay_period)
  double decay_period;
  double first_decay;  // the first step of a param that has decoupled decay
  double cautious_decay;  // whether decoupled decay leaves out elements that the update moves away from 0
  double no_prox;  // 0: decoupled decay divides by 1 + decay after the update
  double max_norm;  // of all gradients; 0: not clipped, not in the norm; < 0: neither, but NaN and inf still show
  double clip_eps;  // added to the norm
  double trust_low;  // bounds of the trust ratio
  double trust_high;
  double trust_always;  // whether the trust ratio is also used without weight decay
  double ema_decay;  // share that a moving average of the weights keeps at each step
  double option_a;  // the rule's own options
  double option_b;
  double option_c;
  double option_d;
};

FUSED_HD GroupHparams read_group_hparams(const double* in) {
  return {in[kGroupLr], in[kGroupBeta1], in[kGroupBeta2], in[kGroupBeta3], in[kGroupEps], in[kGroupWeightDecay], in[kGroupDecoupled], in[kGroupMaximize], in[kGroupLrReference], in[kGroupDecayPeriod], in[kGroupFirstDecay], in[kGroupCautiousDecay], in[kGroupNoProx], in[kGroupMaxNorm], in[kGroupClipEps], in[kGroupTrustLow], in[kGroupTrustHigh], in[kGroupTrustAlways], in[kGroupEmaDecay], in[kGroupOptionA], in[kGroupOptionB], in[kGroupOptionC], in[kGroupOptionD]};
}

// `tensor_scalars`, float64 [tensors, ...]: the numbers that a rule reads. Prepare writes them at each step. Walkers round each number once, to the dtype of their arithmetic.
template <class T>
struct TensorScalars {
  T lr;
  T eps;
  T weight1;  // 1 - beta1
  T weight2;  // 1 - beta2
  T small_beta1;  // beta1 if it is below 0.5, otherwise 0
  T small_beta2;  // beta2 if it is below 0.5, otherwise 0
  T step_size;  // lr / (1 - beta1**step)
  T debias;  // 1 / (1 - beta1**step)
  T denom_scale;  // 1 / sqrt(1 - beta2**step)
  T grad_factor;  // multiplies the gradient: 1 / grad_scale, the clip coefficient, the sign of maximize
  T l2;  // weight decay that is added to the gradient
  T decay;  // decoupled weight decay, multiplied by lr unless the rule has a trust ratio
  T cautious_decay;  // the group's
  T ema_weight;  // weight of the new param in the moving average of the weights
  T skip;  // 1: this tensor is not updated, and the other columns have no meaning
  T own_a;  // results of the rule's function `scalars`
  T own_b;
  T own_c;
  T own_d;
  T own_e;
  T own_f;
};

template <class T>
FUSED_HD TensorScalars<T> read_tensor_scalars(const double* in) {
  return {T(in[kScalarLr]), T(in[kScalarEps]), T(in[kScalarWeight1]), T(in[kScalarWeight2]), T(in[kScalarSmallBeta1]), T(in[kScalarSmallBeta2]), T(in[kScalarStepSize]), T(in[kScalarDebias]), T(in[kScalarDenomScale]), T(in[kScalarGradFactor]), T(in[kScalarL2]), T(in[kScalarDecay]), T(in[kScalarCautiousDecay]), T(in[kScalarEmaWeight]), T(in[kScalarSkip]), T(in[kScalarOwnA]), T(in[kScalarOwnB]), T(in[kScalarOwnC]), T(in[kScalarOwnD]), T(in[kScalarOwnE]), T(in[kScalarOwnF])};
}

// The whole layout by name, which every module shows to Python.
struct LayoutEntry {
  const char* name;
  int64_t number;
};
constexpr LayoutEntry kLayout[] = {
    {"CHUNK", kChunk},
    {"SHARE", kShare},
    {"ALIGNMENT", kAlignment},
    {"MAX_STATES", kMaxStates},
    {"MAX_RUNNING", kMaxRunning},
    {"EMPTY", kEmpty},
    {"SIGNATURE_FIELD_BITS", kSignatureFieldBits},
    {"ABSENT", kAbsent},
    {"EMA_BEGUN", kEmaBegun},
    {"ENTRY_UNALIGNED_BITS", kEntryUnalignedBits},
    {"ENTRY_SIGNATURE_BITS", kEntrySignatureBits},
    {"ENTRY_ROW_BITS", kEntryRowBits},
    {"ENTRY_SIGNATURE_SHIFT", kEntrySignatureShift},
    {"ENTRY_ROW_SHIFT", kEntryRowShift},
    {"ENTRY_CHUNK_SHIFT", kEntryChunkShift},
    {"FORMAT_FLOAT32", kFloat32},
    {"FORMAT_BFLOAT16", kBfloat16},
    {"FORMAT_FLOAT16", kFloat16},
    {"FORMAT_FLOAT64", kFloat64},
    {"FORMAT_BFLOAT16_DITHERED", kBfloat16Dithered},
    {"FORMAT_SPLIT16", kSplit16},
    {"FORMAT_SPLIT8", kSplit8},
    {"FORMAT_E8M8", kE8m8},
    {"FORMAT_ANCHORED8", kAnchored8},
    {"BYTES_FLOAT32", kBytesFloat32},
    {"BYTES_BFLOAT16", kBytesBfloat16},
    {"BYTES_FLOAT16", kBytesFloat16},
    {"BYTES_FLOAT64", kBytesFloat64},
    {"BYTES_BFLOAT16_DITHERED", kBytesBfloat16Dithered},
    {"BYTES_SPLIT16", kBytesSplit16},
    {"BYTES_SPLIT8", kBytesSplit8},
    {"BYTES_E8M8", kBytesE8m8},
    {"BYTES_ANCHORED8", kBytesAnchored8},
    {"STREAM_PARAM", kStreamParam},
    {"STREAM_GRAD", kStreamGrad},
    {"STREAM_STATE0", kStreamState0},
    {"STREAM_EMA", kStreamEma},
    {"ROW_NUMEL", kRowNumel},
    {"ROW_PARAM", kRowParam},
    {"ROW_PARAM_LOW", kRowParamLow},
    {"ROW_STEP", kRowStep},
    {"ROW_DTYPE_SIGNATURE", kRowDtypeSignature},
    {"ROW_STATE0", kRowState0},
    {"ROW_STATE1", kRowState1},
    {"ROW_STATE2", kRowState2},
    {"ROW_STATE3", kRowState3},
    {"ROW_EMA", kRowEma},
    {"ROW_FIRST_ELEMENT", kRowFirstElement},
    {"ROW_ANCHOR", kRowAnchor},
    {"ROW_RUNNING0", kRowRunning0},
    {"ROW_RUNNING1", kRowRunning1},
    {"ROW_RUNNING2", kRowRunning2},
    {"ROW_WIDTH", kRowWidth},
    {"GROUP_LR", kGroupLr},
    {"GROUP_BETA1", kGroupBeta1},
    {"GROUP_BETA2", kGroupBeta2},
    {"GROUP_BETA3", kGroupBeta3},
    {"GROUP_EPS", kGroupEps},
    {"GROUP_WEIGHT_DECAY", kGroupWeightDecay},
    {"GROUP_DECOUPLED", kGroupDecoupled},
    {"GROUP_MAXIMIZE", kGroupMaximize},
    {"GROUP_LR_REFERENCE", kGroupLrReference},
    {"GROUP_DECAY_PERIOD", kGroupDecayPeriod},
    {"GROUP_FIRST_DECAY", kGroupFirstDecay},
    {"GROUP_CAUTIOUS_DECAY", kGroupCautiousDecay},
    {"GROUP_NO_PROX", kGroupNoProx},
    {"GROUP_MAX_NORM", kGroupMaxNorm},
    {"GROUP_CLIP_EPS", kGroupClipEps},
    {"GROUP_TRUST_LOW", kGroupTrustLow},
    {"GROUP_TRUST_HIGH", kGroupTrustHigh},
    {"GROUP_TRUST_ALWAYS", kGroupTrustAlways},
    {"GROUP_EMA_DECAY", kGroupEmaDecay},
    {"GROUP_OPTION_A", kGroupOptionA},
    {"GROUP_OPTION_B", kGroupOptionB},
    {"GROUP_OPTION_C", kGroupOptionC},
    {"GROUP_OPTION_D", kGroupOptionD},
    {"GROUP_WIDTH", kGroupWidth},
    {"SCALAR_LR", kScalarLr},
    {"SCALAR_EPS", kScalarEps},
    {"SCALAR_WEIGHT1", kScalarWeight1},
    {"SCALAR_WEIGHT2", kScalarWeight2},
    {"SCALAR_SMALL_BETA1", kScalarSmallBeta1},
    {"SCALAR_SMALL_BETA2", kScalarSmallBeta2},
    {"SCALAR_STEP_SIZE", kScalarStepSize},
    {"SCALAR_DEBIAS", kScalarDebias},
    {"SCALAR_DENOM_SCALE", kScalarDenomScale},
    {"SCALAR_GRAD_FACTOR", kScalarGradFactor},
    {"SCALAR_L2", kScalarL2},
    {"SCALAR_DECAY", kScalarDecay},
    {"SCALAR_CAUTIOUS_DECAY", kScalarCautiousDecay},
    {"SCALAR_EMA_WEIGHT", kScalarEmaWeight},
    {"SCALAR_SKIP", kScalarSkip},
    {"SCALAR_OWN_A", kScalarOwnA},
    {"SCALAR_OWN_B", kScalarOwnB},
    {"SCALAR_OWN_C", kScalarOwnC},
    {"SCALAR_OWN_D", kScalarOwnD},
    {"SCALAR_OWN_E", kScalarOwnE},
    {"SCALAR_OWN_F", kScalarOwnF},
    {"SCALAR_WIDTH", kScalarWidth},
    {"ARRAY_CHUNK_TABLE", kArrayChunkTable},
    {"ARRAY_ROWS", kArrayRows},
    {"ARRAY_GRADS", kArrayGrads},
    {"ARRAY_LR", kArrayLr},
    {"ARRAY_GROUP_HPARAMS", kArrayGroupHparams},
    {"ARRAY_GROUP_INDEX", kArrayGroupIndex},
    {"ARRAY_TENSOR_SCALARS", kArrayTensorScalars},
    {"ARRAY_ROW_OFFSETS", kArrayRowOffsets},
    {"ARRAY_PARTIALS", kArrayPartials},
    {"ARRAY_SUMS", kArraySums},
    {"ARRAY_TRUST", kArrayTrust},
    {"ARRAY_WIDTH", kArrayWidth},
};

// Entries of chunk_table.
FUSED_HD constexpr int64_t chunk_of(int64_t entry) { return entry >> kEntryChunkShift; }
FUSED_HD constexpr int64_t row_of(int64_t entry) {
  return (entry >> kEntryRowShift) & ((int64_t{1} << kEntryRowBits) - 1);
}
FUSED_HD constexpr bool is_unaligned(int64_t entry) { return (entry & kEntryUnalignedBits) != 0; }
FUSED_HD constexpr int64_t chunk_entry(int64_t chunk, int64_t row, int64_t signature, bool unaligned) {
  return chunk << kEntryChunkShift | row << kEntryRowShift | signature << kEntrySignatureShift | int64_t{unaligned};
}

// Format of a stream of a row.
FUSED_HD constexpr Format format_of(int64_t signature, int stream) {
  return static_cast<Format>((signature >> (kSignatureFieldBits * stream)) & kAbsent);
}
FUSED_HD constexpr int64_t in_signature(int64_t format, int stream) { return format << (kSignatureFieldBits * stream); }

}  // namespace fused_optim
