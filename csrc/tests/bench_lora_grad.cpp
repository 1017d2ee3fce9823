// Stand-alone timing of the CPU kernel, for profilers: bench_lora_grad [groups tokens d_in d_out rank [threads
// [rounds]]]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "kernels/lora_grad.h"

int main(int argc, char** argv) {
  auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  r2f::LoraGradArgs args;
  args.groups = number(1, 32), args.rows = args.groups * number(2, 197);
  args.d_in = number(3, 768), args.d_out = number(4, 768), args.rank = number(5, 8);
  const int64_t threads = number(6, 2), rounds = number(7, 15);

  const size_t x_size = static_cast<size_t>(args.rows * args.d_in);
  const size_t delta_size = static_cast<size_t>(args.rows * args.d_out);
  std::vector<float> x(x_size, 0.5f), delta(delta_size, 0.25f), A(static_cast<size_t>(args.rank * args.d_in), 0.125f);
  std::vector<float> grad_B(static_cast<size_t>(args.groups * args.d_out * args.rank));
  args.x = x.data(), args.delta = delta.data(), args.A = A.data(), args.grad_B = grad_B.data();

  std::vector<double> milliseconds;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int64_t t = 0; t < threads; ++t)
      workers.emplace_back([&, t] {
        r2f::lora_grad_cpu(r2f::DType::kFloat32, args, args.groups * t / threads, args.groups * (t + 1) / threads);
      });
    for (auto& worker : workers) worker.join();
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  const double median = milliseconds[milliseconds.size() / 2], bytes = 4.0 * static_cast<double>(x_size + delta_size);
  const double flops = 2.0 * static_cast<double>(args.rank) * static_cast<double>(x_size + delta_size);
  std::printf("median %.3f ms, best %.3f ms; at the best %.1f GB/s, %.1f GFLOP/s\n", median, milliseconds[0],
              bytes / milliseconds[0] / 1e6, flops / milliseconds[0] / 1e6);
}
