// One instruction set's entry for the dispatcher.
#include "isa.h"

#include "attend_block.h"

namespace deltastore::DELTASTORE_ISA {

const Kernels kernels = {DELTASTORE_ISA_NAME, sizeof(AttendScratch), attend_segment, arrange_block,
                         decode_tile,         encode_tile,           raw_rows,       rotate_rows,
                         read_bytes};

}  // namespace deltastore::DELTASTORE_ISA
