"""Builds r2f_ext._C: C++ glue through torch's BuildExtension, and each CUDA kernel by one call of nvcc.

R2F_BUILD=auto   (default) with CUDA where a CUDA toolkit is found, else for the CPU only
         =cpu    CPU kernels only
         =cuda   fails if it cannot build for CUDA
         =none   pure Python: every operator runs on its PyTorch reference
TORCH_CUDA_ARCH_LIST (like "8.0;9.0+PTX"), CUDA_HOME, CUDA_PATH and CXX are honoured.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
FLAGS = ["-O2", "-std=c++20", "-fvisibility=hidden", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
RECORD = "_build_info.json"  # read by r2f_ext/ops/backend.py before it loads the module


def stop(sentence):
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"\nr2f-ext: {sentence}\n")


def cuda_home():
    """The folder of nvcc and its headers, or None.

    torch's own guess is None in a CPU build of torch, and wrong where nvcc is a wrapper script.
    """
    places = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        *sorted(glob("/usr/local/cuda-*"))[::-1],
    ]
    for place in filter(None, places):
        if Path(place, "bin/nvcc").exists() and Path(place, "include/cuda_runtime.h").exists():
            return Path(place)
    return None


def gencode():
    """nvcc's flags for the GPU architectures, and their list. No GPU is queried: most build machines have none."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0+PTX").replace(" ", ";")
    flags = []
    for arch in filter(None, wanted.split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            stop(f"TORCH_CUDA_ARCH_LIST has {arch!r}; write numbers, like 8.0;9.0+PTX.")
        if int(number.rstrip("af")) < 80:
            stop(f"TORCH_CUDA_ARCH_LIST has {arch!r}; the kernels need compute capability 8.0 or newer.")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, wanted


def build_mode():
    """("none" | "cpu" | "cuda", the CUDA toolkit or None)"""
    mode = os.environ.get("R2F_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        stop(f"R2F_BUILD={mode} is unknown; use auto, cpu, cuda or none.")
    if mode == "none":
        return mode, None
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++").split()[0], "c++", "g++")):
        stop("no C++ compiler was found: install one (g++ 11 or newer), or set R2F_BUILD=none for no compiled kernels.")
    toolkit = cuda_home() if mode in ("auto", "cuda") else None
    if mode == "cuda" and toolkit is None:
        stop("R2F_BUILD=cuda, but no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) was found; set CUDA_HOME.")
    return ("cuda" if toolkit else "cpu"), toolkit


def extension(mode, toolkit):
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        stop("torch is needed to build: install it, then `pip install --no-build-isolation .` (or set R2F_BUILD=none).")

    sources = [s for s in (CSRC / "sources.txt").read_text().split("\n") if s and not s.startswith("#")]
    cuda_sources = [s for s in sources if s.endswith(".cu")] if mode == "cuda" else []
    cuda_version, archs, arch_flags = "none", "none", []
    if mode == "cuda":
        arch_flags, archs = gencode()
        report = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        cuda_version = report.split("release ")[1].split(",")[0]
        if tuple(map(int, cuda_version.split(".")[:2])) < (12, 1):
            stop(f"CUDA {cuda_version} was found, and 12.1 or newer is needed: set CUDA_HOME, or R2F_BUILD=cpu.")
    record = {
        "mode": mode,
        "torch": torch.__version__,
        "cuda": cuda_version,
        "cuda_major": None if mode == "cpu" else int(cuda_version.split(".")[0]),
        "cuda_archs": archs,
        "cxx_flags": " ".join(FLAGS),
    }

    class Build(BuildExtension):
        def build_extensions(self):
            folder = Path(self.build_temp).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            objects = [folder / (Path(s).stem + "_cuda.o") for s in cuda_sources]

            def compile_cuda(source, target):
                command = [toolkit / "bin/nvcc", *NVCC_FLAGS, *arch_flags, f"-I{CSRC}", f"-I{CSRC}/include"]
                subprocess.check_call([*command, "-c", CSRC / source, "-o", target])

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                list(pool.map(compile_cuda, cuda_sources, objects))
            self.extensions[0].extra_objects += [str(o) for o in objects]

            macros = {"TORCH": "torch", "CUDA": "cuda", "ARCHS": "cuda_archs", "FLAGS": "cxx_flags"}
            lines = [f"#define R2F_BUILT_{macro} {json.dumps(record[key])}\n" for macro, key in macros.items()]
            (folder / "r2f_built.h").write_text("".join(lines))
            self.extensions[0].include_dirs.append(str(folder))

            super().build_extensions()
            self.record_path().write_text(json.dumps(record, indent=1) + "\n")

        def record_path(self):
            return Path(self.build_lib, "r2f_ext", RECORD)

        def copy_extensions_to_source(self):  # build_ext --inplace, and editable installs
            super().copy_extensions_to_source()
            shutil.copy(self.record_path(), "r2f_ext")

        def get_outputs(self):
            return [*super().get_outputs(), str(self.record_path())]

    module = CppExtension(
        "r2f_ext._C",
        [str(CSRC / s) for s in sources if s.endswith(".cpp")],
        include_dirs=[str(CSRC.resolve()), str((CSRC / "include").resolve())],
        define_macros=[("R2F_WITH_CUDA", "1")] if mode == "cuda" else [],
        # at::parallel_for is OpenMP code in a header. It uses the OpenMP runtime that torch has loaded; linking another
        # one would give two thread pools.
        extra_compile_args=[*FLAGS, "-fopenmp"],
        # The CUDA runtime is linked statically, so that the module also loads in a CPU build of torch.
        extra_link_args=[f"-L{toolkit}/lib64", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        if mode == "cuda"
        else [],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


BUILDS = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}
mode, toolkit = (
    build_mode() if BUILDS & set(sys.argv) else ("none", None)
)  # asking for metadata needs neither torch nor a compiler
setup(**(extension(mode, toolkit) if mode != "none" else {}))
