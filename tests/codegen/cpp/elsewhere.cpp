// Makes one call of a kernel's library for a process that cannot load it, as it is for another kind of processor.
//
// Standard input: the number of threads, the address of the `Call` and of its table of tables, the number of regions of
// memory; each region's address and size in the asking process; their bytes. Numbers are int64. Whatever points into a
// region is made to point to its copy. Standard output: the bytes of the regions after the call.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "splat/call.hpp"

namespace {

struct Region {
  int64_t address, size;
};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "elsewhere: %s\n", what);
  exit(2);
}

void read(void* to, size_t size) {
  if (fread(to, 1, size, stdin) != size) fail("the input is too short");
}

}  // namespace

int main(int, char** arguments) {
  int64_t head[4];
  read(head, sizeof head);
  const int64_t threads = head[0], call_at = head[1], tables_at = head[2], num_regions = head[3];
  auto* const regions = new Region[num_regions];
  auto* const copies = new char*[num_regions];
  read(regions, sizeof(Region) * num_regions);
  for (int64_t n = 0; n < num_regions; ++n) read(copies[n] = new char[regions[n].size], regions[n].size);

  auto move = [&](auto& pointer) {
    for (int64_t n = 0; n < num_regions; ++n) {
      const int64_t offset = (int64_t)pointer - regions[n].address;
      if (offset < 0 || offset >= regions[n].size) continue;
      pointer = (decltype(+pointer))(copies[n] + offset);
      return;
    }
    if (pointer) fail("an address is in no region");
  };
  for (int64_t n = 0; n < num_regions; ++n)
    if (regions[n].address == tables_at)
      for (int64_t byte = 0; byte < regions[n].size; byte += sizeof(void*)) move(*(void**)(copies[n] + byte));
  auto* call = (splat::Call*)call_at;
  move(call);
  for (splat::Array* one = &call->query; one <= &call->d_value; ++one) move(one->data);
  move(call->kv_lengths), move(call->tables), move(call->num_groups);

  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (!library) fail(dlerror());
  auto* const run = (int (*)(const splat::Call*, int, void*))dlsym(library, "splat_run");
  if (!run || run(call, (int)threads, nullptr)) fail("the call failed");
  for (int64_t n = 0; n < num_regions; ++n) fwrite(copies[n], 1, regions[n].size, stdout);
  if (fflush(stdout)) fail("the output cannot be written");
}
