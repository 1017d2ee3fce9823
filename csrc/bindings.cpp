// The module r2f_ext._C. Loading it registers the compiled kernels (TORCH_LIBRARY_IMPL in torch/); its only function
// returns build information.
#include <pybind11/pybind11.h>

#include "r2f/simd.h"
#include "r2f_built.h"  // written by setup.py: R2F_BUILT_TORCH and the others, as string literals

namespace {

const char* cpu_isa() {
  switch (r2f::simd::best_isa()) {
    case r2f::simd::Isa::kAvx512: return "avx512";
    case r2f::simd::Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = R2F_BUILT_TORCH;
  info["cuda"] = R2F_BUILT_CUDA;  // "none" in a build without CUDA
  info["cuda_archs"] = R2F_BUILT_ARCHS;
  info["cxx_flags"] = R2F_BUILT_FLAGS;
  info["cpu_isa"] = cpu_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of r2f_ext; importing it registers them as torch operators.";
  module.def("build_info", &build_info, "What this module was built with, and the CPU instruction set that it uses.");
}
