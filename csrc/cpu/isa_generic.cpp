// The loops in vectors of 16 bytes, for the compiler's default target (SSE2 on x86-64, NEON on ARM).
#include "loops.h"
