// The row loops in 16-byte vectors for whatever the compiler targets by itself (SSE2 on x86-64, NEON on ARM).
#include <math.h>

#include "../math/activations.h"
#include "../math/philox.h"
#include "../math/storage.h"
#include "isa.h"

#define CKPT_VECTOR_BYTES 16
namespace ckpt {
namespace generic {
#include "vec.h"
// After vec.h, which it is written in.
#include "activation_rows.h"
#include "moments_rows.h"

#include "bias_act_rows.h"
#include "channel_norm_rows.h"
#include "glu_rows.h"
#include "row_norm_rows.h"
#include "sum_rows.h"
}  // namespace generic
}  // namespace ckpt
