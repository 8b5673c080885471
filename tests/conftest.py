"""What all tests start from."""

import signal

# A shell's background job ignores SIGINT, and so would every server that the tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
