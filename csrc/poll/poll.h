// What the looks at groups and at tensors share: their answers, and how they spare themselves cache misses.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace fused_optim {

namespace py = pybind11;

// What has moved; these add up. kRebuild: the tables are stale, nothing else is meant.
enum Answer { kRebuild = 1, kGradsMoved = 2, kRawChanged = 4 };

// A look passes some thousand tensors at every step, and after a pass over the model all of this has left the caches:
// hence flat arrays, of what is looked at and no more, and memory that is asked for this many rows or groups ahead.
constexpr size_t kAhead = 12;

inline void prefetch_lines(const void* object, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(object) + 64 * line);
}

// A number that changes whenever a dict does (PEP 509): one cache line to look at in place of ten. 0 where this Python
// has none; the dicts are then compared entry by entry.
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

inline bool unchanged(PyObject* dict, uint64_t version) { return kVersions && version_of(dict) == version; }

}  // namespace fused_optim
