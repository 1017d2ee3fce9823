// Helpers of the kernel tests: random inputs of each dtype, and a comparison that counts failures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "r2f/dtype.h"

namespace r2f::test {

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat64 ? "float64" : "bfloat16";
}
inline size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2; }

// An array of one dtype, in memory of exactly its size (so that AddressSanitizer detects every access past it), and its
// values as doubles.
class Array {
 public:
  Array(DType dtype, int64_t size, std::mt19937& random, bool finite = true)
      : values(static_cast<size_t>(size)), dtype_(dtype), bytes_(static_cast<size_t>(size) * bytes_of(dtype)) {
    bytes_.reserve(1);  // an empty array has an address too: null means "no such argument"
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i)
      set(i, finite ? normal(random) : NAN);  // outputs start as NaN, so that unwritten elements fail the comparison
  }

  // Stores the value, rounded to the dtype (bfloat16: truncated), in memory and in `values`.
  void set(int64_t index, double value) {
    const float single = static_cast<float>(value);
    if (dtype_ == DType::kBFloat16) {
      uint32_t bits;
      std::memcpy(&bits, &single, 4);
      const BFloat16 upper{static_cast<uint16_t>(bits >> 16)};
      value = widen(upper);
      std::memcpy(at(index), &upper, 2);
    } else if (dtype_ == DType::kFloat32) {
      value = single;
      std::memcpy(at(index), &single, 4);
    } else {
      std::memcpy(at(index), &value, 8);
    }
    values[static_cast<size_t>(index)] = value;
  }

  // The element in memory; float32 and float64 only.
  double get(int64_t index) {
    float single;
    double wide;
    if (dtype_ == DType::kFloat64) return std::memcpy(&wide, at(index), 8), wide;
    return std::memcpy(&single, at(index), 4), single;
  }

  void* data() { return bytes_.data(); }
  void* at(int64_t index) { return bytes_.data() + static_cast<size_t>(index) * bytes_of(dtype_); }
  std::vector<double> values;

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// Compares results of the accumulation type with doubles. Returns the number of failures (0 or 1) and prints them.
inline int compare(const char* what, Array& result, DType accumulation, const std::vector<double>& expected) {
  const double tolerance = accumulation == DType::kFloat64 ? 1e-12 : 2e-5;
  double scale = 1;
  for (double e : expected) scale = std::fmax(scale, std::fabs(e));
  for (size_t i = 0; i < expected.size(); ++i) {
    double got;
    if (accumulation == DType::kFloat64) {
      std::memcpy(&got, static_cast<char*>(result.data()) + 8 * i, 8);
    } else {
      float single;
      std::memcpy(&single, static_cast<char*>(result.data()) + 4 * i, 4);
      got = single;
    }
    if (!(std::fabs(got - expected[i]) <= tolerance * scale)) {
      std::printf("WRONG %s [%zu]: %.9g, expected %.9g\n", what, i, got, expected[i]);
      return 1;
    }
  }
  return 0;
}

}  // namespace r2f::test
