// Threads come from OpenMP: the runtime that torch uses, so both share one pool of threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace deltastore {

// f(0) .. f(runs - 1), on up to `runs` threads. Which thread executes a run changes nothing: what a
// run does depends on its number alone, even if fewer threads came than were asked for.
template <typename Function>
void for_each_run(int64_t runs, const Function& f) {
#ifdef _OPENMP
  if (runs > 1) {
#pragma omp parallel num_threads(static_cast<int>(runs))
    for (int64_t run = omp_get_thread_num(); run < runs; run += omp_get_num_threads()) f(run);
    return;
  }
#endif
  for (int64_t run = 0; run < runs; ++run) f(run);
}

}  // namespace deltastore
