// The bandwidth probe: the reads and writes of a step without arithmetic. Benchmarks compare the step with it.
#pragma once
#include <cstdint>
#include <vector>

namespace fused_optim {

constexpr int kProbeWritten = 8, kProbeRead = 4;  // maximum numbers of streams

// Streams with the same number of bytes: first those that are read and written, then those that are only read.
struct ProbeRow {
  std::vector<char*> streams;
  int64_t bytes;
};

// One unit of work: a range of bytes of each stream of a row.
struct ProbeSpan {
  const ProbeRow* row;
  int64_t begin, end;
};

// The access pattern of a probe. piece: bytes of each stream that a thread takes at a time, scheduled dynamically. 0:
// each thread has one contiguous share. prefetch: prefetch distance in bytes; 0: no prefetch.
struct ProbePattern {
  int64_t piece;
  int threads;
  int prefetch;
};

inline std::vector<ProbeSpan> probe_spans(const std::vector<ProbeRow>& rows, int64_t piece) {
  constexpr int64_t kLeast = 16384;  // granularity of the contiguous shares
  if (piece == 0) piece = kLeast;
  std::vector<ProbeSpan> spans;
  for (const ProbeRow& row : rows) {
    for (int64_t begin = 0; begin < row.bytes; begin += piece)
      spans.push_back({&row, begin, begin + piece < row.bytes ? begin + piece : row.bytes});
  }
  return spans;
}

}  // namespace fused_optim
