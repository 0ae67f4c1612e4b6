// Counts the instructions that a step of the CPU walker executes, by single-stepping a child process.
// Compiled together with the CPU walker of its own tree; -I gives the tree, WALKER the instruction set.
// Arguments: rule; number of tensors; chunks per tensor; 1 with a weight average, else 0; 1 if gradients are scaled and
// clipped, else 0; dtype codes of param, gradient and states. Prints the instructions of step() and of apply_update().
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/step.h"

using namespace fused_optim;

namespace {

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

// The count includes a constant number of instructions for raising the two signals.
template <class F>
long long count_instructions(F&& work) {
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) fail("ptrace");
    work();  // not counted: the first call also does one-time work
    raise(SIGSTOP);
    work();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) fail("the step");
  long long count = 0;
  do {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) fail("ptrace");
    waitpid(child, &status, 0);
    if (!WIFSTOPPED(status)) fail("the step");
    ++count;
  } while (WSTOPSIG(status) != SIGSTOP);
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return count;
}

}  // namespace

int main(int, char** arguments) {
  const char* rule = *++arguments;
  const int64_t tensors = std::atoi(*++arguments), chunks = std::atoi(*++arguments);
  const bool averages = std::atoi(*++arguments);
  const bool clips = std::atoi(*++arguments);
  std::vector<int64_t> dtypes;
  while (*++arguments != nullptr) dtypes.push_back(std::atoi(*arguments));

  std::vector<float> steps(tensors);
  std::vector<int64_t> chunk_table, row_offsets, grads, rows(tensors * kRowWidth), lr(1);
  std::vector<int32_t> group_index(tensors);
  std::vector<double> tensor_scalars(tensors * kScalarWidth), group_hparams(kGroupWidth), trust(tensors, 1.0),
      sums(2 * tensors);
  const auto new_tensor = [&] {
    void* memory = std::aligned_alloc(64, chunks * kChunk * 8 + 64);
    std::fill_n(static_cast<char*>(memory), chunks * kChunk * 8, '\0');
    return reinterpret_cast<int64_t>(memory);
  };
  for (int64_t row = 0; row < tensors; ++row) {
    int64_t* columns = &rows[row * kRowWidth];
    columns[kRowNumel] = chunks * kChunk, columns[kRowParam] = new_tensor();
    columns[kRowStep] = reinterpret_cast<int64_t>(&steps[row]);
    for (int stream = 0; stream < kStreamEma; ++stream) {
      const bool present = stream < static_cast<int>(dtypes.size());
      columns[kRowDtypeSignature] |= in_signature(present ? dtypes[stream] : kAbsent, stream);
      if (present && stream >= kStreamState0) columns[address_column(stream)] = new_tensor();
    }
    columns[kRowDtypeSignature] |= in_signature(averages ? int{kFloat32} : kAbsent, kStreamEma);
    if (averages) columns[kRowEma] = new_tensor();
    grads.push_back(new_tensor());
    row_offsets.push_back(static_cast<int64_t>(chunk_table.size()));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) chunk_table.push_back(chunk_entry(chunk, row, 0, false));
  }
  row_offsets.push_back(static_cast<int64_t>(chunk_table.size()));
  std::vector<double> partials(2 * chunk_table.size() + 1);
  double* group = group_hparams.data();
  group[kGroupLr] = 1e-3, group[kGroupBeta1] = 0.9, group[kGroupBeta2] = 0.999, group[kGroupEps] = 1e-8;
  group[kGroupWeightDecay] = 0.01, group[kGroupDecoupled] = 1, group[kGroupLrReference] = 1,
  group[kGroupDecayPeriod] = 1, group[kGroupNoProx] = 1;
  group[kGroupTrustHigh] = INFINITY, group[kGroupMaxNorm] = clips ? 1 : 0;

  const float scale = 4, found = 0;
  const double squares = 9;
  Tables t{};
  t.chunk_table = chunk_table.data(), t.rows = rows.data(), t.grads = grads.data(), t.lr = lr.data(),
  t.group_hparams = group_hparams.data();
  t.group_index = group_index.data(), t.tensor_scalars = tensor_scalars.data(), t.row_offsets = row_offsets.data(),
  t.partials = partials.data();
  t.sums = sums.data(), t.trust = trust.data(), t.chunks = static_cast<int64_t>(chunk_table.size()),
  t.tensors = tensors;
  if (clips) t.grad_scale = &scale, t.found_inf = &found, t.squares = &squares;
  t.ema = averages;
  if (!WALKER::walker.step(rule, t, 1)) fail("no such rule");
  std::printf("%lld ", count_instructions([&] { WALKER::walker.step(rule, t, 1); }));
  std::printf("%lld\n", count_instructions([&] { WALKER::walker.apply_update(rule, t, 1); }));
}
