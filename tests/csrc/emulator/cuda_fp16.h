#pragma once
#include "float_types.h"
