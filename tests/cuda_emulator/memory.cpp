// Shared and global memory: what is allocated, what was written, and, in the race build, who
// accessed it last and whether the next to do so knows. In that build kernels are compiled with
// -fsanitize=thread, but not linked to its library: the calls that the compiler inserts end here.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#define NEURON_EXT_WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NEURON_EXT_WITH_ASAN 1
#endif
#endif
#ifdef NEURON_EXT_WITH_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#endif

namespace neuron_ext::emulator {
namespace {

constexpr int kPoison = 0xff;  // nan in every type
constexpr std::size_t kCellBytes = 2;

std::string agent_name(const Block& block, int agent) {
  if (agent < block.thread_count) return "thread " + std::to_string(agent);
  const int unit = agent - block.thread_count;
  if (unit < kLoadUnits) return "a tma_load";
  if (unit < kLoadUnits + kStoreUnits) return "a tma_store";
  return "a wgmma of warpgroup " + std::to_string(unit - kLoadUnits - kStoreUnits);
}

[[noreturn]] void fail_race(const Block& block, const char* memory, std::size_t offset,
                            const char* now, int agent, Site site, const char* before,
                            int other_agent, Site other_site) {
  fail("race on %s+%zu: %s %s at %s, and nothing orders it after %s that %s at %s", memory, offset,
       agent_name(block, agent).c_str(), now, describe(site).c_str(),
       agent_name(block, other_agent).c_str(), before, describe(other_site).c_str());
}

}  // namespace

// ---- shared memory -----------------------------------------------------------------------------

Block::Block() {
  shared = static_cast<std::byte*>(std::aligned_alloc(1024, kArenaBytes));
  if (shared == nullptr) throw std::bad_alloc();
  if (kSeesAccesses) cells.resize(kArenaBytes / kCellBytes);
}

Block::~Block() {
  ASAN_UNPOISON_MEMORY_REGION(shared, kArenaBytes);
  std::free(shared);
}

bool is_shared(const Block& block, const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) -
             reinterpret_cast<std::uintptr_t>(block.shared) <
         kArenaBytes;
}

namespace {

void allocate(Block& block, std::size_t offset, std::size_t bytes) {
  block.shared_used = offset + bytes;
  ASAN_UNPOISON_MEMORY_REGION(block.shared + offset, bytes);
  std::memset(block.shared + offset, kPoison, bytes);
  if (!kSeesAccesses) return;
  for (std::size_t c = offset / kCellBytes; c < (offset + bytes + 1) / kCellBytes; ++c) {
    block.cells[c].allocated = true;
  }
}

}  // namespace

void reset_shared(Block& block) {
  if (kSeesAccesses) {
    const auto used = static_cast<std::ptrdiff_t>((block.shared_used + 1) / kCellBytes);
    std::for_each(block.cells.begin(), block.cells.begin() + used,
                  [](Cell& cell) { cell = Cell(); });
  }
  ASAN_POISON_MEMORY_REGION(block.shared, kArenaBytes);
  block.statics.clear();
  block.shared_used = block.static_bytes = 0;
  if (machine.dynamic_bytes > 0) allocate(block, 0, machine.dynamic_bytes);
}

void* dynamic_shared(std::size_t bytes) {
  if (bytes > machine.dynamic_bytes) {
    fail("dynamic shared memory: %zu bytes used, %zu given at launch", bytes,
         machine.dynamic_bytes);
  }
  return machine.current->block->shared;
}

void* static_shared(const void* identity, std::size_t bytes) {
  Block& block = *machine.current->block;
  const auto [found, is_first] = block.statics.try_emplace(identity, 0);
  if (is_first) {
    // An odd multiple of the alignment that there is on a GPU: what relies on more won't get it.
    constexpr std::size_t kAlignment = 16, kRedZone = 128;
    found->second =
        (block.shared_used + kRedZone) / (2 * kAlignment) * (2 * kAlignment) + kAlignment;
    allocate(block, found->second, bytes);
    block.static_bytes += bytes;
    if (block.static_bytes > kStaticLimit ||
        block.static_bytes + machine.dynamic_bytes > kSharedLimit) {
      fail("more shared memory than there is: %zu static, %zu dynamic", block.static_bytes,
           machine.dynamic_bytes);
    }
  }
  return block.shared + found->second;
}

std::uint32_t shared_address(const void* shared) {
  const Block& block = *machine.current->block;
  if (!is_shared(block, shared)) fail("not a pointer to shared memory");
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(shared) - block.shared);
}

void access_shared(Block& block, std::size_t offset, std::size_t bytes, bool write, int agent,
                   const Clock& clock, Site site) {
  if (!kSeesAccesses) return;
  const auto has_seen = [&](int other, std::uint32_t time) {
    return other == agent || clock[static_cast<std::size_t>(other)] >= time;
  };
  const char* const doing = write ? "writes" : "reads";
  for (std::size_t c = offset / kCellBytes; c <= (offset + bytes - 1) / kCellBytes; ++c) {
    if (c >= block.cells.size() || !block.cells[c].allocated) {
      fail("out of bounds: %s %s %zu bytes at shared+%zu, at %s", agent_name(block, agent).c_str(),
           doing, bytes, offset, describe(site).c_str());
    }
    Cell& cell = block.cells[c];
    const std::size_t at = c * kCellBytes;
    if (cell.is_mbarrier) {
      fail("shared+%zu is an mbarrier: %s %s it at %s", at, agent_name(block, agent).c_str(), doing,
           describe(site).c_str());
    }
    if (cell.copies > 0) {
      fail("race on shared+%zu: %s %s at %s while a copy_async is under way from %s", at,
           agent_name(block, agent).c_str(), doing, describe(site).c_str(),
           describe(cell.write_site).c_str());
    }
    if (cell.write_time > 0 && !has_seen(cell.writer, cell.write_time)) {
      fail_race(block, "shared", at, doing, agent, site, "writes", cell.writer, cell.write_site);
    }
    const std::uint32_t now = clock[static_cast<std::size_t>(agent)];
    if (!write) {
      if (cell.write_time == 0) {
        fail("uninitialised: %s reads shared+%zu at %s", agent_name(block, agent).c_str(), at,
             describe(site).c_str());
      }
      if (cell.readers != nullptr) {
        (*cell.readers)[static_cast<std::size_t>(agent)] = now;
      } else if (cell.read_time > 0 && !has_seen(cell.reader, cell.read_time)) {
        cell.readers = std::make_unique<Clock>(static_cast<std::size_t>(block.agents()));
        (*cell.readers)[cell.reader] = cell.read_time;
        (*cell.readers)[static_cast<std::size_t>(agent)] = now;
      } else {
        cell.reader = static_cast<std::uint16_t>(agent);
        cell.read_time = now;
      }
      cell.read_site = site;
      continue;
    }
    if (cell.readers != nullptr) {
      for (int other = 0; other < block.agents(); ++other) {
        if (has_seen(other, (*cell.readers)[static_cast<std::size_t>(other)])) continue;
        fail_race(block, "shared", at, doing, agent, site, "reads", other, cell.read_site);
      }
      cell.readers.reset();
    } else if (cell.read_time > 0 && !has_seen(cell.reader, cell.read_time)) {
      fail_race(block, "shared", at, doing, agent, site, "reads", cell.reader, cell.read_site);
    }
    cell.read_time = 0;
    cell.writer = static_cast<std::uint16_t>(agent);
    cell.write_time = now;
    cell.write_site = site;
  }
}

void set_under_way(Block& block, std::size_t offset, std::size_t bytes, bool under_way) {
  if (!kSeesAccesses) return;
  for (std::size_t c = offset / kCellBytes; c <= (offset + bytes - 1) / kCellBytes; ++c) {
    block.cells[c].copies = under_way ? 1 : 0;
  }
}

void check_proxy(Block& block, std::size_t offset, std::size_t bytes, const char* reader) {
  if (!kSeesAccesses) return;
  for (std::size_t c = offset / kCellBytes; c <= (offset + bytes - 1) / kCellBytes; ++c) {
    const Cell& cell = block.cells[c];
    if (cell.write_time == 0 || cell.writer >= block.thread_count) continue;
    if (cell.write_time < block.threads[cell.writer]->proxy_fence) continue;
    fail("no async_proxy_fence between thread %d's write at %s and a %s of shared+%zu", cell.writer,
         describe(cell.write_site).c_str(), reader, c * kCellBytes);
  }
}

// ---- global memory -----------------------------------------------------------------------------

namespace {

constexpr std::size_t kGuardBytes = 4096;

/// What a cell of global memory was last used for, in which launch.
struct Use {
  std::int64_t launch = 0, block = 0;
  int thread = 0;
  std::uint32_t time = 0;
  Site site = nullptr;
};

struct GlobalCell {
  bool written = false;
  Use write, read;
};

struct WatchedArray {
  std::size_t bytes;
  const char* name;
  std::vector<GlobalCell> cells;
};

std::map<std::uintptr_t, WatchedArray>& watched_arrays() {
  static std::map<std::uintptr_t, WatchedArray> arrays;
  return arrays;
}

void check_order(const Thread& thread, const Use& before, const char* what_before, const char* now,
                 const char* name, std::size_t offset, Site site) {
  if (before.launch != machine.launch_number) return;
  bool has_seen;
  if (before.block == thread.block->number) {
    has_seen = before.thread == thread.index ||
               thread.clock[static_cast<std::size_t>(before.thread)] >= before.time;
  } else {
    const auto known = thread.foreign.find(before.block);
    has_seen = known != thread.foreign.end() &&
               known->second[static_cast<std::size_t>(before.thread)] >= before.time;
  }
  if (has_seen) return;
  fail(
      "race on %s+%zu: this thread %s at %s, and nothing orders it after thread %d of block %lld "
      "that %s at %s",
      name, offset, now, describe(site).c_str(), before.thread,
      static_cast<long long>(before.block), what_before, describe(before.site).c_str());
}

}  // namespace

void access_global(Thread& thread, const void* address, std::size_t bytes, bool write, Site site) {
  if (!kSeesAccesses) return;
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  auto& arrays = watched_arrays();
  auto found = arrays.upper_bound(first + kGuardBytes);
  if (found == arrays.begin()) return;
  --found;
  auto& [base, array] = *found;
  if (first - (base - kGuardBytes) >= array.bytes + 2 * kGuardBytes) return;
  const std::size_t offset = first - base;
  const char* const doing = write ? "writes" : "reads";
  if (first < base || offset + bytes > array.bytes) {
    fail("out of bounds: thread %d %s %zu bytes at %s%+td of %zu, at %s", thread.index, doing,
         bytes, array.name, static_cast<std::ptrdiff_t>(offset), array.bytes,
         describe(site).c_str());
  }
  for (std::size_t c = offset / kCellBytes; c <= (offset + bytes - 1) / kCellBytes; ++c) {
    GlobalCell& cell = array.cells[c];
    const std::size_t at = c * kCellBytes;
    if (!write && !cell.written) {
      fail("uninitialised: thread %d reads %s+%zu at %s", thread.index, array.name, at,
           describe(site).c_str());
    }
    check_order(thread, cell.write, "writes", doing, array.name, at, site);
    if (write) check_order(thread, cell.read, "reads", doing, array.name, at, site);
    Use& use = write ? cell.write : cell.read;
    use = {machine.launch_number, thread.block->number, thread.index,
           thread.clock[static_cast<std::size_t>(thread.index)], site};
    if (write) cell.written = true;
  }
}

void access(const void* address, std::size_t bytes, bool write, Site site) {
  if (!kSeesAccesses || machine.current == nullptr) return;
  Thread& thread = *machine.current;
  if (thread.fiber.owns(reinterpret_cast<std::uintptr_t>(address))) return;
  Block& block = *thread.block;
  if (is_shared(block, address)) {
    access_shared(block,
                  static_cast<std::size_t>(static_cast<const std::byte*>(address) - block.shared),
                  bytes, write, thread.index, thread.clock, site);
  } else {
    access_global(thread, address, bytes, write, site);
  }
}

void check_alignment(const void* address, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) != 0) {
    fail("misaligned: %d bytes at %p, at %s", bytes, address,
         describe(__builtin_return_address(0)).c_str());
  }
}

GlobalArray::GlobalArray(std::size_t bytes, const char* name) : bytes_(bytes) {
  // The address sanitizer has its own guards, right at the end; elsewhere what an out-of-bounds
  // write may hit is ours.
#ifdef NEURON_EXT_WITH_ASAN
  constexpr std::size_t kGuards = 0;
#else
  constexpr std::size_t kGuards = kGuardBytes;
#endif
  static_cast<void>(name);
  std::byte* const memory = static_cast<std::byte*>(std::malloc(bytes + 2 * kGuards));
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, kPoison, bytes + 2 * kGuards);
  data_ = memory + kGuards;
  if (kSeesAccesses) {
    WatchedArray& array = watched_arrays()[reinterpret_cast<std::uintptr_t>(data_)];
    array.bytes = bytes;
    array.name = name;
    array.cells.resize(bytes / kCellBytes + 1);
  }
}

GlobalArray::~GlobalArray() {
#ifdef NEURON_EXT_WITH_ASAN
  std::free(data_);
#else
  watched_arrays().erase(reinterpret_cast<std::uintptr_t>(data_));
  std::free(data_ - kGuardBytes);
#endif
}

std::byte* GlobalArray::data() const { return data_; }

void GlobalArray::set_written() {
  if (!kSeesAccesses) return;
  for (GlobalCell& cell : watched_arrays()[reinterpret_cast<std::uintptr_t>(data_)].cells) {
    cell.written = true;
  }
}

}  // namespace neuron_ext::emulator

// ---- the compiler's calls ----------------------------------------------------------------------

#ifdef NEURON_EXT_EMULATOR_SEES_ACCESSES

extern "C" {

#define NEURON_EXT_ACCESS(name, bytes, write)                                         \
  void __tsan_##name(void* address) {                                                 \
    neuron_ext::emulator::access(address, bytes, write, __builtin_return_address(0)); \
  }
#define NEURON_EXT_ACCESSES(bytes)                       \
  NEURON_EXT_ACCESS(read##bytes, bytes, false)           \
  NEURON_EXT_ACCESS(write##bytes, bytes, true)           \
  NEURON_EXT_ACCESS(unaligned_read##bytes, bytes, false) \
  NEURON_EXT_ACCESS(unaligned_write##bytes, bytes, true)

NEURON_EXT_ACCESSES(1)
NEURON_EXT_ACCESSES(2)
NEURON_EXT_ACCESSES(4)
NEURON_EXT_ACCESSES(8)
NEURON_EXT_ACCESSES(16)

#undef NEURON_EXT_ACCESSES
#undef NEURON_EXT_ACCESS

void __tsan_read_range(void* address, std::size_t bytes) {
  neuron_ext::emulator::access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
  neuron_ext::emulator::access(address, bytes, true, __builtin_return_address(0));
}
void* __tsan_memcpy(void* target, const void* source, std::size_t bytes) {
  neuron_ext::emulator::access(source, bytes, false, __builtin_return_address(0));
  neuron_ext::emulator::access(target, bytes, true, __builtin_return_address(0));
  return std::memcpy(target, source, bytes);
}
void* __tsan_memmove(void* target, const void* source, std::size_t bytes) {
  neuron_ext::emulator::access(source, bytes, false, __builtin_return_address(0));
  neuron_ext::emulator::access(target, bytes, true, __builtin_return_address(0));
  return std::memmove(target, source, bytes);
}
void* __tsan_memset(void* target, int value, std::size_t bytes) {
  neuron_ext::emulator::access(target, bytes, true, __builtin_return_address(0));
  return std::memset(target, value, bytes);
}

/// Of a function's static variable: whether it is initialised.
std::uint8_t __tsan_atomic8_load(const volatile std::uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"

#endif
