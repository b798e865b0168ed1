// Loops that are cut over threads where that pays.
#pragma once

namespace thalweg {

// work(0) to work(count - 1). One thread goes without OpenMP: a region of its own costs a microsecond.
template <class Work>
inline void each(long count, long threads, bool split, Work work) {
    if (threads < 2 || count < 2 || !split) {
        for (long i = 0; i < count; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long i = 0; i < count; i++) work(i);
}

}  // namespace thalweg
