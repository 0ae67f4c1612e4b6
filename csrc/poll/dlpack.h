// Reads tensors through torch's DLPack exchange table, without torch's headers. The structs have the layouts of
// DLPack's specification, version 1 (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace fused_optim {

namespace py = pybind11;

struct DlDevice {
  int32_t type, id;
};

struct DlType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr uint8_t kDlComplex = 5;

inline bool operator==(DlType a, DlType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
inline bool operator==(DlDevice a, DlDevice b) { return a.type == b.type && a.id == b.id; }

struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlType dtype;
  const int64_t *shape, *strides;
  uint64_t byte_offset;

  const void* address() const { return static_cast<const char*>(data) + byte_offset; }
};

struct DlHeader {
  uint32_t major, minor;
  const DlHeader* previous;
};

struct DlExchange {
  DlHeader header;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*describe)(void* object, DlTensor* out);  // 0, or -1 with a Python exception
  void* current_stream;
};

// torch's exchange table. Throws if this torch has none of version 1.
const DlExchange& exchange();

// Returns false, without an exception, if torch cannot describe the tensor, for example a sparse or a meta tensor.
inline bool describe(PyObject* tensor, DlTensor& out) {
  static const auto function = exchange().describe;
  if (function(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

// An attribute of torch's tensors. The C getter is looked up once, because a poll makes thousands of calls, and a
// look-up by name costs as much as the call.
class Getter {
 public:
  explicit Getter(const char* name);
  // Throws Python's exception.
  py::object operator()(PyObject* tensor) const;

 private:
  getter get_;
  void* closure_;
};

// A method of torch's tensors that takes no arguments and returns a bool, looked up once like a Getter.
class Question {
 public:
  explicit Question(const char* name);
  bool operator()(PyObject* tensor) const;

 private:
  PyCFunction method_;
};

}  // namespace fused_optim
