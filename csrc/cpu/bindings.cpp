// The module of the CPU walker, one per instruction set. setup.py compiles this folder once for each; FUSED_ISA is the
// namespace and FUSED_MODULE the name of the module.
#include "../bindings.h"

#include "probe.h"
#include "step.h"
#include "threads.h"

namespace fused_optim {
namespace {

const CpuWalker& walker = FUSED_ISA::walker;

int threads_for(const Arrays& arrays, int threads) {
  return fused_optim::threads_for(arrays.elements, arrays.tables.chunks, threads);
}

// The bandwidth probe over given memory. Streams are lists of addresses, all of one length. The memory at address t of
// each stream has sizes[t] bytes. piece, prefetch: see ProbePattern.
class BandwidthProbe {
 public:
  using Streams = std::vector<std::vector<int64_t>>;

  BandwidthProbe(const Streams& written, const Streams& read, const std::vector<int64_t>& sizes, int64_t piece,
                 int prefetch)
      : pattern_{piece, 1, prefetch}, written_(static_cast<int>(written.size())), read_(static_cast<int>(read.size())) {
    if (written_ < 1 || written_ > kProbeWritten || read_ < 1 || read_ > kProbeRead)
      throw py::value_error("a bandwidth probe takes 1 to " + std::to_string(kProbeWritten) +
                            " written streams and 1 to " + std::to_string(kProbeRead) + " read streams, but got " +
                            std::to_string(written_) + " and " + std::to_string(read_));
    for (size_t t = 0; t < sizes.size(); ++t) {
      ProbeRow row{{}, sizes[t]};
      for (const Streams* streams : {&written, &read}) {
        for (const auto& stream : *streams) {
          if (stream.size() != sizes.size())
            throw py::value_error("every stream of a bandwidth probe must have one address per size");
          row.streams.push_back(pointer<char>(stream[t]));
        }
      }
      rows_.push_back(std::move(row));
    }
    spans_ = probe_spans(rows_, piece);
  }

  void run(int threads) const {
    py::gil_scoped_release release;
    ProbePattern pattern = pattern_;
    pattern.threads = threads;
    walker.bandwidth_probe(spans_, written_, read_, pattern);
  }

 private:
  std::vector<ProbeRow> rows_;
  std::vector<ProbeSpan> spans_;
  ProbePattern pattern_;
  int written_, read_;
};

}  // namespace

PYBIND11_MODULE(FUSED_MODULE, m) {
  add_identity(m);
  add_rules(m);
  add_arrays(m);

  m.def("step", [](const std::string& rule, const Arrays& arrays, int64_t grad_scale, int64_t found_inf,
                   int64_t squares, int threads) {
    const Tables t = with_scaling(arrays, grad_scale, found_inf, squares);
    bool found;
    {
      py::gil_scoped_release release;
      found = walker.step(rule.c_str(), t, threads_for(arrays, threads));
    }
    require_rule(found, rule);
  });
  m.def("apply_update", [](const std::string& rule, const Arrays& arrays, int threads) {
    py::gil_scoped_release release;
    walker.apply_update(rule.c_str(), arrays.tables, threads_for(arrays, threads));
  });
  m.def("squares", [](const Arrays& arrays, int64_t out, int threads) {
    py::gil_scoped_release release;
    *pointer<double>(out) = walker.squares(arrays.tables, threads_for(arrays, threads));
  });
  m.def("scale", [](const Arrays& arrays, int64_t squares, int threads) {
    py::gil_scoped_release release;
    walker.scale(with_scaling(arrays, 0, 0, squares), threads_for(arrays, threads));
  });

  py::class_<BandwidthProbe>(m, "BandwidthProbe", py::module_local())
      .def(py::init<const BandwidthProbe::Streams&, const BandwidthProbe::Streams&, const std::vector<int64_t>&,
                    int64_t, int>(),
           py::arg("written"), py::arg("read"), py::arg("sizes"), py::arg("piece"), py::arg("prefetch"))
      .def("__call__", &BandwidthProbe::run, py::arg("threads"));
}

}  // namespace fused_optim
