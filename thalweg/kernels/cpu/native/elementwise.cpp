// RMSNorm over rows, and the rotation of their last channels.
#include "streams.h"

using namespace thalweg;

namespace {

constexpr double SPLIT_FROM = 200e3;  // elements below which a second thread costs more than it brings

}  // namespace

extern "C" {

// out = weight * x / sqrt(mean(x^2) + eps); weight 0: ones.
void thalweg_rms_norm(const float* x, const float* weight, long rows, long width, float eps, float* out,
                      long threads) {
    const bool split = threads > 1 && (double)rows * width > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads(threads) if (split)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width, scale = 1.0f / std::sqrt(mean_square(from, width) + eps);
        float* to = out + row * width;
        for (long i = 0; i < width; i += LANES) {
            floats v = load_some(from + i, width - i) * scale;
            if (weight != nullptr) v *= load_some(weight + i, width - i);
            store_some(to + i, v, width - i);
        }
    }
}

// Pairs of the last 2 * pairs channels of each row, turned by cos and sin [tokens, pairs]; the others are copied.
void thalweg_rotate(const float* x, const float* cosines, const float* sines, long tokens, long heads, long width,
                    long pairs, float* out, long threads) {
    const bool split = threads > 1 && (double)tokens * heads * width > SPLIT_FROM;
#pragma omp parallel for schedule(static) num_threads(threads) if (split)
    for (long row = 0; row < tokens * heads; row++) {
        const float *from = x + row * width, *c = cosines + row / heads * pairs, *s = sines + row / heads * pairs;
        float* to = out + row * width;
        const long plain = width - 2 * pairs;
        memcpy(to, from, 4 * plain);
        for (long i = 0; i < pairs; i++) {
            const float a = from[plain + 2 * i], b = from[plain + 2 * i + 1];
            to[plain + 2 * i] = a * c[i] - b * s[i];
            to[plain + 2 * i + 1] = a * s[i] + b * c[i];
        }
    }
}
}
