// The walk over the elements of a chunk: one thread's share of a pass. Included by kernels.cuh and packed.cuh.
#pragma once
#include "../prep.h"
#include "formats.cuh"

namespace fused_optim {

constexpr int kThreads = 128;  // per block of a kernel that handles one chunk, or sums one row

// Which pass a kernel does. kUpdate is the whole step of rules without a trust ratio. Rules with one are walked by
// kUpdateMoments, and by kApplyUpdate once the ratios are known. kSquares reads gradients only.
enum class Pass { kUpdate, kUpdateMoments, kApplyUpdate, kSquares };

// Streams are numbered as in the signature: param, grad, states. The average of the weights, if there is one, comes
// directly after the states.

constexpr bool reads(Pass pass, int stream) {
  if (pass == Pass::kSquares) return stream == kStreamGrad;
  return pass != Pass::kApplyUpdate || stream != kStreamGrad;
}

constexpr bool writes(Pass pass, int stream) {
  if (stream == kStreamParam) return pass == Pass::kUpdate || pass == Pass::kApplyUpdate;
  return stream != kStreamGrad && (pass == Pass::kUpdate || pass == Pass::kUpdateMoments);
}

constexpr bool sums_up(Pass pass) { return pass == Pass::kUpdateMoments || pass == Pass::kSquares; }

// Sums over elements. No initializers, because shared memory holds them, too.
struct Sums {
  double first, second;  // squares of the two numbers that the rule measures; `first`: of the gradients in kSquares

  FUSED_HD Sums& operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

// The scalars of a row. In the second walk of a rule with a trust ratio, lr is multiplied by the ratio. kSquares runs
// before prepare and has no scalars.
template <Pass pass, class T>
FUSED_HD TensorScalars<T> scalars_of(const Tables& t, int64_t row) {
  if constexpr (pass == Pass::kSquares) {
    return {};
  } else {
    const double* in = t.tensor_scalars + row * kScalarWidth;
    TensorScalars<T> h = read_tensor_scalars<T>(in);
    if constexpr (pass == Pass::kApplyUpdate) h.lr = static_cast<T>(in[kScalarLr] * t.trust[row]);
    return h;
  }
}

// Updates param and states of one element.
template <Pass pass, class Rule, class T, int S>
FUSED_HD void update_element(const TensorScalars<T>& h, T& param, T grad, T (&state)[S > 0 ? S : 1]) {
  if constexpr (pass == Pass::kUpdate) param = apply<Rule, T, S>(h, param, grad, state);
  else if constexpr (pass == Pass::kUpdateMoments)
    Rule::template update_moments<T, S>(h, gradient(h, param, grad), state);
  else if constexpr (pass == Pass::kApplyUpdate) param = apply_direction<Rule, T, S>(h, param, state);
}

// sum + x * x. The square of a float is exact in double, so fma gives the same result with one instruction less.
template <class T>
FUSED_HD double plus_square(double sum, T x) {
  const double wide = x;
  return sizeof(T) == 4 ? fma(wide, wide, sum) : sum + wide * wide;
}

// Adds one element to the sums. The states are those that were stored, because kApplyUpdate computes the update from
// them.
template <Pass pass, class Rule, class T, int S>
FUSED_HD void measure_element(const TensorScalars<T>& h, T param, T grad, const T (&state)[S > 0 ? S : 1], Sums& sums) {
  if constexpr (pass == Pass::kUpdateMoments) {
    const Measured<T> measured = Rule::template measure<T, S>(h, param, gradient(h, param, grad), state);
    sums.first = plus_square(sums.first, measured.first);
    sums.second = plus_square(sums.second, measured.second);
  } else if constexpr (pass == Pass::kSquares) {
    sums.first = plus_square(sums.first, grad);
  }
}

// Whether the update needs the registers of one more stream. A rule with squares among its states takes roots and
// divides, and the average stays in registers until then.
template <Pass pass, class Rule, bool kAverages>
constexpr bool crowds() {
  if constexpr (pass == Pass::kUpdate && kAverages) return Rule::signed_states < Rule::max_states;
  return false;
}

// One thread's share of the whole vectors of one chunk. kStored: the format of all streams; kAbsent if they differ or
// have another format. Returns the number of elements in the vectors of all threads.
template <Pass pass, class Rule, bool kAverages, int kStored, class T, int S>
FUSED_HD int update_vectors(const TensorScalars<T>& h, const Stream (&streams)[kStreamState0 + S + kAverages],
                            int count, int thread, Sums& sums) {
  constexpr int kAverage = kStreamState0 + S, kStreams = kAverage + kAverages, kPart = kAccess / sizeof(T);
  constexpr int V = kVector<T, kStored, kStreams - (pass == Pass::kApplyUpdate) + crowds<pass, Rule, kAverages>()>;
  Stream stream[kStreams];
  for (int i = 0; i < kStreams; ++i) {
    if (!reads(pass, i)) continue;
    stream[i] = streams[i];
    if (kStored != kAbsent) stream[i].format = static_cast<Format>(kStored);
  }
  const int vectored = count - count % V;
  Pack<T, V> pack[kStreams];
  const auto load_all = [&](int first, int gap) {
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) load(stream[i], first, gap, pack[i]);
    }
  };
  // bfloat16: the loads of the next iteration are issued before the arithmetic of this one, if registers suffice.
  constexpr bool kAhead = kStored == kBfloat16 && pass != Pass::kSquares && !kAverages && kStreams <= 4;
  if (kAhead && thread * V < vectored) load_all(thread * V, kPart);

  for (int piece = 0; piece < vectored; piece += kThreads * V) {
    // If all streams are float32, neighbouring threads access neighbouring 16 bytes.
    const bool spread = kStored == kFloat32 && piece + kThreads * V <= vectored;
    const int gap = spread ? kThreads * kPart : kPart;
    const int first = piece + thread * (spread ? kPart : V);
    if (first >= vectored) break;
    T x[kStreams][V];
    // All loads are issued before the first use.
    if (!kAhead) load_all(first, gap);
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) unpack(pack[i], stream[i].format, x[i]);
    }
    // The last iteration loads its own vectors again, from the cache, and does not use them. A condition on these loads
    // would cost an instruction per word.
    if (kAhead) load_all(first + kThreads * V < vectored ? first + kThreads * V : first, gap);
    for (int v = 0; v < V; ++v) {
      T state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      update_element<pass, Rule, T, S>(as_usual(h), x[kStreamParam][v], x[kStreamGrad][v], state);
      for (int s = 0; s < S; ++s) x[kStreamState0 + s][v] = state[s];
    }
    for (int i = 0; i < kAverage; ++i) {
      if (!writes(pass, i)) continue;
      Pack<T, V> stored;
      pack_up(x[i], stream[i].format, stored);
      store(stream[i], first, gap, stored);
      if (sums_up(pass) || (kAverages && i == kStreamParam)) unpack(stored, stream[i].format, x[i]);
    }
    if constexpr (kAverages) {
      for (int v = 0; v < V; ++v) x[kAverage][v] = averaged(h, x[kAverage][v], x[kStreamParam][v]);
      Pack<T, V> stored;
      pack_up(x[kAverage], stream[kAverage].format, stored);
      store(stream[kAverage], first, gap, stored);
    }
    for (int v = 0; v < V; ++v) {
      T state[S > 0 ? S : 1];
      for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s][v];
      measure_element<pass, Rule, T, S>(h, x[kStreamParam][v], x[kStreamGrad][v], state, sums);
    }
  }
  return vectored;
}

// One thread's share of one chunk.
template <Pass pass, class Rule, bool kAverages, class T, int S>
FUSED_HD Sums update_chunk(const Tables& t, int64_t row_number, int64_t chunk, bool unaligned, int thread) {
  constexpr int kAverage = kStreamState0 + S, kStreams = kAverage + kAverages;
  const TensorScalars<T> h = scalars_of<pass, T>(t, row_number);
  const int64_t* row = t.rows + row_number * kRowWidth;
  const int64_t signature = row[kRowDtypeSignature], grad = t.grads[row_number];
  const int64_t begin = chunk * kChunk, left = row[kRowNumel] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  Stream stream[kStreams];
  bool all_float32 = true, all_bfloat16 = true;
  for (int i = 0; i < kStreams; ++i) {
    if (!reads(pass, i)) continue;
    const int place = i == kAverage ? kStreamEma : i;
    const int64_t address = i == kStreamGrad ? grad : row[address_column(place)];
    // If T is double, all streams are float64. A constant format saves registers, which are scarce with an average.
    stream[i] = Stream(address, kAverages && sizeof(T) == 8 ? kFloat64 : format_of(signature, place), begin);
    all_float32 = all_float32 && stream[i].format == kFloat32;
    all_bfloat16 = all_bfloat16 && stream[i].format == kBfloat16;
  }
  // `unaligned` covers param, states and average.
  const bool aligned = !(reads(pass, kStreamParam) && unaligned) && !(reads(pass, kStreamGrad) && grad % kAccess != 0);
  Sums sums{};
  const bool special = (pass != Pass::kApplyUpdate && has_small_betas(h)) || h.cautious_decay != T(0);
  const bool by_vectors = aligned && !special;
  int vectored = 0;
  // The usual formats have loops of their own, without branches on formats.
  if constexpr (sizeof(T) == 8) {
    if (by_vectors) vectored = update_vectors<pass, Rule, kAverages, kFloat64, T, S>(h, stream, count, thread, sums);
  } else if (by_vectors) {
    vectored = all_float32    ? update_vectors<pass, Rule, kAverages, kFloat32, T, S>(h, stream, count, thread, sums)
               : all_bfloat16 ? update_vectors<pass, Rule, kAverages, kBfloat16, T, S>(h, stream, count, thread, sums)
                              : update_vectors<pass, Rule, kAverages, kAbsent, T, S>(h, stream, count, thread, sums);
  }

  for (int element = vectored + thread; element < count; element += kThreads) {
    T x[kStreams], state[S > 0 ? S : 1];
    for (int i = 0; i < kStreams; ++i) {
      if (reads(pass, i)) x[i] = load_one<T>(stream[i], element);
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    update_element<pass, Rule, T, S>(h, x[kStreamParam], x[kStreamGrad], state);
    for (int s = 0; s < S; ++s) x[kStreamState0 + s] = state[s];
    for (int i = 0; i < kAverage; ++i) {
      if (!writes(pass, i)) continue;
      store_one(stream[i], element, x[i]);
      if (sums_up(pass) || (kAverages && i == kStreamParam)) x[i] = load_one<T>(stream[i], element);
    }
    if constexpr (kAverages) {
      store_one(stream[kAverage], element, averaged(h, x[kAverage], x[kStreamParam]));
    }
    for (int s = 0; s < S; ++s) state[s] = x[kStreamState0 + s];
    measure_element<pass, Rule, T, S>(h, x[kStreamParam], x[kStreamGrad], state, sums);
  }
  return sums;
}

}  // namespace fused_optim
