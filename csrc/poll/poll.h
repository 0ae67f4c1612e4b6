// Shared by the parts of the poll: the answers, and the avoidance of cache misses.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace fused_optim {

namespace py = pybind11;

// What changed, as flags. kRebuild: new tables are needed, and the other flags mean nothing.
enum Answer { kRebuild = 1, kGradsMoved = 2, kRawChanged = 4 };

// A poll reads thousands of tensors at every step, and after a pass over the model none of their data is in the caches.
// So the poll keeps flat arrays of only what it compares, and prefetches.
constexpr size_t kAhead = 12;  // prefetch distance in rows or groups

inline void prefetch_lines(const void* object, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(object) + 64 * line);
}

// The version of a dict, which changes whenever the dict does (PEP 509): comparing it reads one cache line instead of
// ten. 0 if this Python has no versions; dicts are then compared entry by entry.
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
constexpr bool kVersions = true;
#else
constexpr bool kVersions = false;
#endif
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

inline void prefetch_version(PyObject* dict) {
  __builtin_prefetch(&reinterpret_cast<PyDictObject*>(dict)->ma_used + 1);  // the version is after the size
}

inline bool unchanged(PyObject* dict, uint64_t version) { return kVersions && version_of(dict) == version; }

}  // namespace fused_optim
