// What the memory allows: the ceiling that benchmarks hold the step against.
#pragma once
#include <cstdint>
#include <vector>

namespace fused_optim {

// One set of streams of as many bytes each: the first `written` are read and written, the last one is read.
struct FloorRow {
  std::vector<char*> streams;
  int64_t bytes;
};

// What one turn takes.
struct FloorSpan {
  const FloorRow* row;
  int64_t begin;
};

std::vector<FloorSpan> floor_spans(const std::vector<FloorRow>& rows);

// A pass with the reads and writes of a step and no arithmetic, in one parallel region. False for more than eight
// written streams.
bool floor_pass(const std::vector<FloorSpan>& spans, int written, int threads);

}  // namespace fused_optim
