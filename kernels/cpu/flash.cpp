// The C interface of flash.h: the choice of instruction set, threads, scratch. Portable flags.
#include "flash.h"

#include <omp.h>

#include "scratch.h"

namespace tinyllm {
namespace {

const FlashIsa* chosen(const Attention& p) {
  if (p.isa == 3 && p.is_bf16) return &kFlashBf16;
  if (p.isa >= 2) return kFlashAvx512 + (p.is_bf16 ? 1 : 0);
  return kFlashAvx2 + (p.is_bf16 ? 1 : 0);
}

bool possible(const Attention& p) {
  return p.isa >= 1 && p.isa <= 3 && p.n_batch >= 0 && p.n_tokens >= 0 && p.n_kv_heads >= 1 &&
         p.n_heads % p.n_kv_heads == 0 && p.width >= 16 && p.width <= kMaxWidth &&
         p.width % 16 == 0 && p.value_width >= 16 && p.value_width <= kMaxWidth &&
         p.value_width % 16 == 0 && p.window >= 0 && p.scale > 0;
}

int run(const Attention& p, bool backward, int64_t threads) {
  if (!possible(p)) return -1;
  if (p.n_tokens == 0) return 0;
  const FlashIsa& isa = *chosen(p);
  const int64_t tasks = p.n_batch * p.n_kv_heads;
  const auto bytes = static_cast<size_t>(isa.scratch_bytes(p, backward));
  bool short_of_memory = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads))
  for (int64_t task = 0; task < tasks; ++task) {
    thread_local Scratch scratch;
    void* memory = scratch.reserve(bytes);
    if (memory == nullptr) {
#pragma omp atomic write
      short_of_memory = true;
    } else {
      (backward ? isa.backward : isa.forward)(p, task, memory);
    }
  }
  return short_of_memory ? -2 : 0;
}

}  // namespace
}  // namespace tinyllm

int tinyllm_flash_forward(const tinyllm::Attention* problem, int64_t threads) {
  return tinyllm::run(*problem, false, threads);
}

int tinyllm_flash_backward(const tinyllm::Attention* problem, int64_t threads) {
  return tinyllm::run(*problem, true, threads);
}
