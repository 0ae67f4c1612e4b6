// Distributes the chunks and rows of a table over the threads, for all passes of the CPU walker.
#pragma once
#include <algorithm>

#include "../dispatch.h"
#include "../prep.h"
#include "formats.h"
#include "threads.h"

namespace fused_optim::FUSED_ISA {
namespace {

// Calls walk(t, first, end) for ranges of consecutive chunks that together are all chunks of the table, from all
// threads.
template <class F>
void walk_chunks(const Tables& t, int threads, Order order, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto work = [&](int64_t piece) { walk(t, piece * per_piece, std::min((piece + 1) * per_piece, t.chunks)); };
  run_pieces((t.chunks + per_piece - 1) / per_piece, threads, order,
             [](const void* context, int64_t piece) { (*static_cast<const decltype(work)*>(context))(piece); }, &work);
}

// Like walk_chunks, but calls open(row, memo) once for every row before its chunks are walked. The thread that walks a
// row opens it, so no thread waits for another. Rows that span several pieces are opened first, by the calling thread.
template <class Open, class F>
void walk_rows(const Tables& t, int threads, Order order, const Open& open, const F& walk) {
  const int64_t per_piece = chunks_per_piece(t.chunks, threads);
  const auto shared = [&](int64_t chunk) {  // whether this chunk and the one before belong to the same row
    return chunk < t.chunks && row_of(t.chunk_table[chunk - 1]) == row_of(t.chunk_table[chunk]);
  };
  BiasCorrections memo{};
  int64_t opened = -1;
  for (int64_t chunk = per_piece; chunk < t.chunks; chunk += per_piece) {
    if (shared(chunk) && row_of(t.chunk_table[chunk]) != opened) open(opened = row_of(t.chunk_table[chunk]), memo);
  }
  if (t.chunks == 0) {
    for (int64_t row = 0; row < t.tensors; ++row) open(row, memo);
  }
  walk_chunks(t, threads, order, [&](const Tables&, int64_t first, int64_t end) {
    BiasCorrections own = memo;
    // Opens the rows that begin in this piece and are not opened yet. Rows without elements have no chunks: the piece
    // with the next row's first chunk opens them, or the last piece.
    const int64_t end_row = end == t.chunks ? t.tensors : row_of(t.chunk_table[end - 1]) + !shared(end);
    for (int64_t row = first == 0 ? 0 : row_of(t.chunk_table[first - 1]) + 1; row < end_row; ++row) open(row, own);
    walk(t, first, end);
  });
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
