// The loops in vectors of 16 bytes, for the set that the compiler targets by itself (SSE2 on x86-64, NEON on ARM).
#include "loops.h"
