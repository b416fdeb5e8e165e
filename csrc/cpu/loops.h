// The loops of every family, for the instruction set of target.h.
#pragma once

#include "bias_act_rows.h"
#include "channel_norm_rows.h"
#include "dyt_rows.h"
#include "glu_rows.h"
#include "map_norm_rows.h"
#include "rotary_rows.h"
#include "row_norm_rows.h"
#include "sum_rows.h"
#include "transpose_rows.h"
