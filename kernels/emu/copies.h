// cp.async in the emulator: the old bytes are gone at once, the new ones come at the wait.
#pragma once
#include "emu.h"

namespace emu {

static void copy_start(void* to, const void* from, int n_bytes) {
  Thread& me = self();
  check_shared(to, n_bytes, "cp_async");
  if (reinterpret_cast<uintptr_t>(from) % n_bytes)
    fail("cp_async: source is not a multiple of %d", n_bytes);
  if (me.n_copies == kMaxCopies) fail("more than %d copies in flight", kMaxCopies);
  memset(to, 0xff, n_bytes);
  me.copies[me.n_copies++] = {static_cast<char*>(to), static_cast<const char*>(from), n_bytes};
}

static void copy_commit() {
  Thread& me = self();
  if (me.n_groups == kMaxCopies) fail("more than %d groups of copies in flight", kMaxCopies);
  me.group_end[me.n_groups++] = me.n_copies;
}

static void copy_wait(int n_left) {  // at most n_left groups stay in flight
  Thread& me = self();
  const int n = me.n_groups - n_left;
  if (n <= 0) return;
  const int end = me.group_end[n - 1];
  for (int i = 0; i < end; i++) {
    const Copy& c = me.copies[i];
    if (c.from) memcpy(c.to, c.from, c.n_bytes);
    else memset(c.to, 0, c.n_bytes);
  }
  memmove(me.copies, me.copies + end, (me.n_copies - end) * sizeof(Copy));
  me.n_copies -= end, me.n_groups -= n;
  for (int i = 0; i < me.n_groups; i++) me.group_end[i] = me.group_end[i + n] - end;
}

}  // namespace emu
