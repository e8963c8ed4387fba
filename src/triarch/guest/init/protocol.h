/* What the host and this program agree on: the C side of guest/protocol.py (a test compares them). */
#ifndef TRIARCH_PROTOCOL_H
#define TRIARCH_PROTOCOL_H

#define AGENT_PORT "triarch.agent"
#define CONTROL_PORT "triarch.control"
#define REPORT_PORT "triarch.report"
#define FW_CFG_KEY "opt/triarch/config"
#define DELTA_SERIAL "delta"
#define MODULES_SERIAL "modules"
#define LAYER_SERIAL "layer"
#define MAX_LAYERS 32
#define MAX_CONFIG_BYTES 65536
#define MAX_RECORDS 4096
#define MAX_FRAME_BYTES 65536
#define STDIN_WINDOW_BYTES 65536
#define MAX_REQUEST_BYTES 2097152

enum frame_type {
    FRAME_STDIN = 1,
    FRAME_END_OF_INPUT = 2,
    FRAME_RESIZE = 3,
    FRAME_STOP = 4,
    FRAME_ADAPT = 8,
    FRAME_READY = 16,
    FRAME_STDOUT = 17,
    FRAME_STDERR = 18,
    FRAME_CREDIT = 19,
    FRAME_EXIT = 20,
    FRAME_PROBLEM = 21,
    FRAME_ADAPTED = 24,
};

#endif
