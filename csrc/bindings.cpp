// What Python sees of the C++.
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu/floor.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "cuda/step.h"
#include "watch.h"

namespace fused_optim {
namespace {

// backends.py looks for these words in the file before it loads it: another torch has other tensors.
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
[[gnu::used]] const char kBuiltFor[] = "built for torch " TEXT(TORCH_VERSION_MAJOR) "." TEXT(TORCH_VERSION_MINOR) ".";

int threads_for(int64_t elements, int64_t chunks) {
  return fused_optim::threads_for(elements, chunks, at::get_num_threads());
}

// The arrays of one table, held for as long as their addresses are: made once, used at every step.
struct Arrays {
  std::vector<std::optional<at::Tensor>> held;
  Tables tables;
  int64_t elements;
};

template <class T>
T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Arrays make_arrays(const std::vector<std::optional<at::Tensor>>& x, int64_t elements, bool ema) {
  TORCH_CHECK(x.size() == 11, "a table has 11 arrays, but got ", x.size());
  Tables t{};
  t.desc = data<const int64_t>(x[0]);
  t.rows = data<const int64_t>(x[1]);
  t.grads = data<const int64_t>(x[2]);
  t.lr = data<const int64_t>(x[3]);
  t.raw = data<const double>(x[4]);
  t.group = data<const int32_t>(x[5]);
  t.hyper = data<double>(x[6]);
  t.spans = data<const int64_t>(x[7]);
  t.partials = data<double>(x[8]);
  t.sums = data<double>(x[9]);
  t.trust = data<double>(x[10]);
  t.chunks = x[0]->numel();
  t.tensors = static_cast<int32_t>(x[1]->size(0));
  t.ema = ema;
  return {x, t, elements};
}

// What comes anew with each step: one number each, in the memory of the table's device.
Tables with_scaling(const Arrays& arrays, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& squares) {
  Tables t = arrays.tables;
  t.grad_scale = data<const float>(grad_scale);
  t.found_inf = data<const float>(found_inf);
  t.squares = data<const double>(squares);
  return t;
}

void require_rule(bool found, const std::string& rule) {
  if (!found)
    throw py::value_error("the extension has no rule \"" + rule +
                          "\"; rebuild it (pip install .) so that it matches the Python files");
}

#ifdef WITH_CUDA
void require_launched(int error, const std::string& rule) {
  require_rule(error != kUnknownRule, rule);
  if (error != 0)
    throw std::runtime_error(std::string("the CUDA step could not be launched: ") + cuda_error_text(error));
}
#endif

// The floor pass over given tensors, ready to run. Streams are lists of as many tensors each; tensor t of all of them
// has one size in bytes.
class FloorPass {
 public:
  using Streams = std::vector<std::vector<at::Tensor>>;

  // threads: 0 for torch's. The pattern is floor.h's.
  FloorPass(const Streams& written, const Streams& read, int64_t piece, int threads, int prefetch)
      : held_(written), pattern_{piece, threads, prefetch} {
    TORCH_CHECK(1 <= written.size() && written.size() <= kFloorWritten && 1 <= read.size() && read.size() <= kFloorRead,
                "a floor pass takes 1 to ", kFloorWritten, " written streams and 1 to ", kFloorRead,
                " that are read, but got ", written.size(), " and ", read.size());
    held_.insert(held_.end(), read.begin(), read.end());
    written_ = static_cast<int>(written.size());
    read_ = static_cast<int>(read.size());
    for (size_t t = 0; t < read[0].size(); ++t) {
      FloorRow row{{}, static_cast<int64_t>(read[0][t].nbytes())};
      for (const auto& stream : held_) {
        TORCH_CHECK(stream.size() == read[0].size() && stream[t].nbytes() == read[0][t].nbytes(),
                    "the streams of a floor pass must hold tensors of the same sizes in bytes; tensor ", t, " differs");
        row.streams.push_back(static_cast<char*>(stream[t].data_ptr()));
      }
      rows_.push_back(std::move(row));
    }
    spans_ = floor_spans(rows_, piece);
  }

  void run() const {
    py::gil_scoped_release release;
    FloorPattern pattern = pattern_;
    if (pattern.threads == 0) pattern.threads = at::get_num_threads();
    instruction_set().walker.floor(spans_, written_, read_, pattern);
  }

 private:
  Streams held_;
  std::vector<FloorRow> rows_;
  std::vector<FloorSpan> spans_;
  FloorPattern pattern_;
  int written_, read_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("LAYOUT") = py::make_tuple(kChunk, kRowWidth, kRawWidth, kHyperWidth);
  m.def("instruction_set", [] { return instruction_set().name; });

  using Number = std::optional<at::Tensor>;
  py::class_<Arrays>(m, "Arrays").def(py::init(&make_arrays), py::arg("arrays"), py::arg("elements"), py::arg("ema"));

  m.def("step_cpu", [](const std::string& rule, const Arrays& arrays, const Number& grad_scale, const Number& found_inf,
                       const Number& squares) {
    const Tables t = with_scaling(arrays, grad_scale, found_inf, squares);
    bool found;
    {
      py::gil_scoped_release release;
      found = instruction_set().walker.step(rule.c_str(), t, threads_for(arrays.elements, t.chunks));
    }
    require_rule(found, rule);
  });
  m.def("move_cpu", [](const std::string& rule, const Arrays& arrays) {
    py::gil_scoped_release release;
    const Tables& t = arrays.tables;
    instruction_set().walker.move(rule.c_str(), t, threads_for(arrays.elements, t.chunks));
  });
  m.def("squares_cpu", [](const Arrays& arrays, at::Tensor out) {
    py::gil_scoped_release release;
    const Tables& t = arrays.tables;
    *out.mutable_data_ptr<double>() = instruction_set().walker.squares(t, threads_for(arrays.elements, t.chunks));
  });
  m.def("scale_cpu", [](const Arrays& arrays, const at::Tensor& squares) {
    const Tables t = with_scaling(arrays, {}, {}, squares);
    py::gil_scoped_release release;
    instruction_set().walker.scale(t, threads_for(arrays.elements, t.chunks));
  });

  m.def("step_cuda_emulated", [](const std::string& rule, const Arrays& arrays, const Number& grad_scale,
                                 const Number& found_inf, const Number& squares) {
    require_rule(launch_step_emulated(rule.c_str(), with_scaling(arrays, grad_scale, found_inf, squares)) == 0, rule);
  });
  m.def("move_cuda_emulated",
        [](const std::string& rule, const Arrays& arrays) { launch_move_emulated(rule.c_str(), arrays.tables); });
  m.def("squares_cuda_emulated", [](const Arrays& arrays, at::Tensor out) {
    launch_squares_emulated(arrays.tables, out.mutable_data_ptr<double>());
  });
  m.def("scale_cuda_emulated", [](const Arrays& arrays, const at::Tensor& squares) {
    launch_scale_emulated(with_scaling(arrays, {}, {}, squares));
  });

#ifdef WITH_CUDA
  m.attr("WITH_CUDA") = true;
  m.def("step_cuda", [](const std::string& rule, const Arrays& arrays, const Number& grad_scale,
                        const Number& found_inf, const Number& squares, int64_t stream, int device) {
    require_launched(launch_step_cuda(rule.c_str(), with_scaling(arrays, grad_scale, found_inf, squares),
                                      reinterpret_cast<void*>(stream), device),
                     rule);
  });
  m.def("move_cuda", [](const std::string& rule, const Arrays& arrays, int64_t stream, int device) {
    require_launched(launch_move_cuda(rule.c_str(), arrays.tables, reinterpret_cast<void*>(stream), device), rule);
  });
  m.def("squares_cuda", [](const Arrays& arrays, at::Tensor out, int64_t stream, int device) {
    require_launched(launch_squares_cuda(arrays.tables, static_cast<double*>(out.data_ptr()),
                                         reinterpret_cast<void*>(stream), device),
                     "");
  });
  m.def("scale_cuda", [](const Arrays& arrays, const at::Tensor& squares, int64_t stream, int device) {
    require_launched(launch_scale_cuda(with_scaling(arrays, {}, {}, squares), reinterpret_cast<void*>(stream), device),
                     "");
  });
#else
  m.attr("WITH_CUDA") = false;
#endif

  py::class_<FloorPass>(m, "FloorPass")
      .def(py::init<const FloorPass::Streams&, const FloorPass::Streams&, int64_t, int, int>(), py::arg("written"),
           py::arg("read"), py::arg("piece") = 0, py::arg("threads") = 0, py::arg("prefetch") = 0)
      .def("__call__", &FloorPass::run);

  py::class_<Watch>(m, "Watch")
      .def(py::init<py::list, py::dict, const std::vector<ColumnSpec>&, const std::vector<std::string>&, at::Tensor,
                    at::Tensor>())
      .def("add_pending", &Watch::add_pending)
      .def("add_row", &Watch::add_row)
      .def("look", &Watch::look)
      .def("done", &Watch::done);
}

}  // namespace fused_optim
