// Threads that wait for work: they spin while a model decodes, and sleep soon after.
#include "pool.h"

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

constexpr int kMost = 256;
constexpr auto kSpin = std::chrono::microseconds(200);  // longer than Python needs between tokens

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
};

}  // namespace

struct Team {
  int size = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> generation{0};
  Scratch scratch[kMost];
};

int team_size(const Team* team) { return team->size; }

void team_wait(Team* team) {
  if (team->size == 1) return;
  const unsigned mine = team->generation.load(std::memory_order_relaxed);
  if (team->arrived.fetch_add(1, std::memory_order_acq_rel) == team->size - 1) {
    team->arrived.store(0, std::memory_order_relaxed);
    team->generation.store(mine + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; team->generation.load(std::memory_order_acquire) == mine; spins++) {
    relax();
    if (spins > 4096) sched_yield();  // the one that is missing may need this core
  }
}

void* team_scratch(Team* team, int member, size_t bytes) {
  Scratch& own = team->scratch[member];
  if (own.size < bytes) {
    free(own.memory);
    own.size = (bytes + 4095) / 4096 * 4096;
    own.memory = aligned_alloc(4096, own.size);
    if (!own.memory) abort();
  }
  return own.memory;
}

namespace {

struct Pool {
  std::mutex running, sleeping;
  std::condition_variable wake;
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<unsigned> ticket{0};
  alignas(64) std::atomic<int> done{0};
  Job job = nullptr;
  void* what = nullptr;
  int workers = 0;
  pid_t owner = getpid();
  Team team;

  void work(int member, unsigned seen) {
    for (;;) {
      seen = next(seen);
      if (member < team.size) job(what, member, &team);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // The ticket after `seen`.
  unsigned next(unsigned seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1;; spins++) {
      const unsigned now = ticket.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleeping);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return ticket.load() != seen; });
    sleepers.fetch_sub(1);
    return ticket.load();
  }

  bool grow(int size) {
    try {
      for (; workers < size - 1; workers++)
        std::thread(&Pool::work, this, workers + 1, ticket.load()).detach();
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }

  bool run(Job new_job, void* new_what, int size) {
    std::lock_guard<std::mutex> lock(running);
    if (!grow(size)) return false;
    team.size = size;
    if (size == 1) {
      new_job(new_what, 0, &team);
      return true;
    }
    job = new_job, what = new_what;
    done.store(0, std::memory_order_relaxed);
    ticket.fetch_add(1);
    if (sleepers.load()) {
      std::lock_guard<std::mutex> guard(sleeping);
      wake.notify_all();
    }
    new_job(new_what, 0, &team);
    for (int spins = 0; done.load(std::memory_order_acquire) < workers; spins++) {
      relax();
      if (spins > 4096) sched_yield();
    }
    return true;
  }
};

Pool* pool = nullptr;  // never freed: its threads outlive the interpreter's last call
std::mutex making;

}  // namespace

bool pool_run(Job job, void* what, int size) {
  Pool* mine;
  {
    std::lock_guard<std::mutex> lock(making);
    // A forked child has no threads but its own, and locks as they were: it starts over.
    if (!pool || pool->owner != getpid()) pool = new (std::nothrow) Pool;
    mine = pool;
  }
  if (!mine) return false;
  return mine->run(job, what, size < 1 ? 1 : size > kMost ? kMost : size);
}
