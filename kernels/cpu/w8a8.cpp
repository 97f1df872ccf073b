// The C interface of w8a8.h: packing, the choice of instruction set, threads. Portable flags.
#include "w8a8.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "scratch.h"

namespace tinyllm {
namespace {

// BF16 has nothing for INT8: the last two are the same.
constexpr const Isa* kIsas[] = {&kScalar, &kAvx2, &kAvx512Vnni, &kAvx512Vnni};
constexpr int64_t kIsaCount = sizeof kIsas / sizeof *kIsas;
constexpr int64_t kRowsPerTask = 96;  // a panel of weights stays in L1 or L2 while this many rows pass

// A second thread costs 5-10 us to wake with passive OpenMP; a core does 30-60 multiplications per
// ns here, so below this much work per thread it only costs.
constexpr int64_t kWorkPerThread = 1 << 20;
constexpr int64_t kQuantizePerThread = 1 << 16;

int useful_threads(int64_t work, int64_t work_per_thread, int64_t threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min(threads, work / work_per_thread)));
}

bool known(int64_t isa) { return isa >= 0 && isa < kIsaCount; }

}  // namespace

const Isa& isa_of(int64_t number) { return *kIsas[number]; }

}  // namespace tinyllm

using namespace tinyllm;

int tinyllm_isa_supported(int64_t isa) {
  __builtin_cpu_init();
  switch (isa) {
    case 0:
      return 1;
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
    case 2:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case 3:
      return tinyllm_isa_supported(2) && __builtin_cpu_supports("avx512bf16") ? 1 : 0;
    default:
      return 0;
  }
}

int tinyllm_pack_w8(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int32_t* offset) {
  if (n < 1 || k < 1 || k > kMaxK) return -1;
  const int64_t groups = round_up(k, kGroup) / kGroup;
  const int64_t padded_n = round_up(n, kLanes);
  std::memset(packed, 0, static_cast<size_t>(padded_n * groups * kGroup));
  std::memset(offset, 0, static_cast<size_t>(padded_n) * sizeof(int32_t));
  for (int64_t row = 0; row < n; ++row) {
    const int64_t first = row / kPanel * kPanel, blocks = panel_blocks(n, first);
    int8_t* lane = packed + first * groups * kGroup + (row - first) * kGroup;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int8_t value = w[row * k + i];
      lane[i / kGroup * blocks * kBlockBytes + i % kGroup] = value;
      sum += value;
    }
    offset[row] = -128 * sum;
  }
  return 0;
}

int tinyllm_quantize_rows(const float* x, int64_t m, int64_t k, int8_t* q, float* scale,
                          int64_t isa, int64_t threads) {
  if (m < 0 || k < 1 || !known(isa)) return -1;
  const Isa& chosen = *kIsas[isa];
#pragma omp parallel for schedule(static) num_threads(useful_threads(m * k, kQuantizePerThread, threads))
  for (int64_t i = 0; i < m; ++i) scale[i] = chosen.quantize(x + i * k, k, q + i * k, 0);
  return 0;
}

int tinyllm_linear(const Weight* weight, const float* x, int64_t m, float* y, int64_t threads) {
  const Weight& w = *weight;
  if (m < 0 || w.n < 1 || w.k < 1 || w.k > kMaxK || !known(w.isa)) return -1;
  const Isa& isa = *kIsas[w.isa];
  const Tile tile = isa.tile(w);
  const int64_t stride = round_up(w.k, 64);
  thread_local Scratch scratch;
  auto* q = static_cast<int8_t*>(scratch.reserve(static_cast<size_t>(m * (stride + 4))));
  if (q == nullptr && m > 0) return -2;
  auto* x_scale = reinterpret_cast<float*>(q + m * stride);

  const auto quantize_row = [&](int64_t i) {
    int8_t* row = q + i * stride;
    for (int64_t j = w.k; j < round_up(w.k, kGroup); ++j) row[j] = 0;  // meets padded, zero weights
    x_scale[i] = isa.quantize(x + i * w.k, w.k, row, isa.flip);
  };
  const int64_t panels = round_up(w.n, kPanel) / kPanel;
  const int64_t chunks = (m + kRowsPerTask - 1) / kRowsPerTask;
  const auto run_task = [&](int64_t task) {
    const int64_t row = task / panels * kRowsPerTask, first = task % panels * kPanel;
    tile(q + row * stride, stride, x_scale + row, std::min(kRowsPerTask, m - row), w, first,
         y + row * w.n + first, w.n);
  };

  const int n_threads = useful_threads(m * w.n * w.k, kWorkPerThread, threads);
  if (n_threads == 1) {  // entering a parallel region costs about 1 us even for one thread
    for (int64_t i = 0; i < m; ++i) quantize_row(i);
    for (int64_t task = 0; task < panels * chunks; ++task) run_task(task);
    return 0;
  }
#pragma omp parallel num_threads(n_threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; ++i) quantize_row(i);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * chunks; ++task) run_task(task);
  }
  return 0;
}
