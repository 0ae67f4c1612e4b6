// How a pass is spread over the threads of torch's OpenMP.
#pragma once
#include <cstdint>

namespace fused_optim {

// Returns 1 where a second thread does not pay, else `most`. Nothing between: OpenMP ends the threads that a
// smaller team leaves out, and the next operation of torch would have to start them anew.
int threads_for(int64_t elements, int64_t chunks, int most);

// Chunks of the table in one piece of work.
int64_t chunks_per_piece(int64_t chunks, int threads);

enum class Order { kForward, kBackward };  // of the pieces of each thread's own share

// Calls work(context, piece) once for each piece from 0 up to `pieces`. Each thread has a share of consecutive pieces
// and takes them in order; when it has none left, it takes the far half of what the slowest one has left. So nobody
// waits for a thread that has not begun, and the threads meet once, at the end. Where that lately took longer than the
// other threads would save, the caller does all of it alone.
void run_pieces(int64_t pieces, int threads, Order order, void (*work)(const void* context, int64_t piece),
                const void* context);

}  // namespace fused_optim
