// Counts the instructions that a step of the CPU walker executes, by single-stepping a child process.
// Compiled together with the CPU walker of any tree; -I gives the tree, WALKER the instruction set.
// Arguments: rule; number of tensors; chunks per tensor; 1 with a weight average, else 0; 1 if gradients are scaled and
// clipped, else 0; dtype codes of param, gradient and states. Prints the instructions of step() and of move().
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
  [[maybe_unused]] const bool averages = std::atoi(*++arguments);
  const bool clips = std::atoi(*++arguments);
  std::vector<int64_t> dtypes;
  while (*++arguments != nullptr) dtypes.push_back(std::atoi(*arguments));

  std::vector<float> steps(tensors);
  std::vector<int64_t> desc, spans, grads, rows(tensors * kRowWidth), lr(1);
  std::vector<int32_t> group(tensors);
  std::vector<double> hyper(tensors * kHyperWidth), raw(kRawWidth), trust(tensors, 1.0), sums(2 * tensors);
  const auto new_tensor = [&] {
    void* memory = std::aligned_alloc(64, chunks * kChunk * 8 + 64);
    std::fill_n(static_cast<char*>(memory), chunks * kChunk * 8, '\0');
    return reinterpret_cast<int64_t>(memory);
  };
  for (int64_t row = 0; row < tensors; ++row) {
    int64_t* columns = &rows[row * kRowWidth];
    columns[kNumel] = chunks * kChunk, columns[kParam] = new_tensor();
    columns[kStep] = reinterpret_cast<int64_t>(&steps[row]);
    for (int stream = 0; stream < 6; ++stream) {
      const bool present = stream < static_cast<int>(dtypes.size());
      columns[kSignature] |= (present ? dtypes[stream] : int64_t{kAbsent}) << (4 * stream);
      if (present && stream >= 2) columns[kFirstState + stream - 2] = new_tensor();
    }
#ifdef HAS_AVERAGE
    columns[kSignature] |= (averages ? int64_t{kFloat32} : int64_t{kAbsent}) << (4 * kEmaStream);
    if (averages) columns[kEma] = new_tensor();
#endif
    grads.push_back(new_tensor());
    spans.push_back(static_cast<int64_t>(desc.size()));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) desc.push_back(chunk << 32 | row << 8);
  }
  spans.push_back(static_cast<int64_t>(desc.size()));
  std::vector<double> partials(2 * desc.size() + 1);
  raw[kLr] = 1e-3, raw[kBeta1] = 0.9, raw[kBeta2] = 0.999, raw[kEps] = 1e-8;
  raw[kWeightDecay] = 0.01, raw[kDecoupled] = 1, raw[kLrReference] = 1, raw[kDecayPeriod] = 1;
  raw[kTrustHigh] = INFINITY, raw[kMaxNorm] = clips ? 1 : 0;

  const float scale = 4, found = 0;
  const double squares = 9;
  Tables t{};
  t.desc = desc.data(), t.rows = rows.data(), t.grads = grads.data(), t.lr = lr.data(), t.raw = raw.data();
  t.group = group.data(), t.hyper = hyper.data(), t.spans = spans.data(), t.partials = partials.data();
  t.sums = sums.data(), t.trust = trust.data(), t.chunks = static_cast<int64_t>(desc.size()), t.tensors = tensors;
  if (clips) t.grad_scale = &scale, t.found_inf = &found, t.squares = &squares;
#ifdef HAS_AVERAGE
  t.ema = averages;
#endif
  if (!WALKER::walker.step(rule, t, 1)) fail("no such rule");
  std::printf("%lld ", count_instructions([&] { WALKER::walker.step(rule, t, 1); }));
  std::printf("%lld\n", count_instructions([&] { WALKER::walker.move(rule, t, 1); }));
}
