/* PID 1 of an `app` guest: runs the command, carries its input and output, reports its exit. */
#define _GNU_SOURCE
#include "guest.h"
#include "protocol.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define LAST_WORDS_MS 10000
#define END_OF_TRANSMISSION "\4"

static struct {
    pid_t pid;
    bool terminal, ended;
    int status;
    int input, output, error; /* our ends; -1 where there is none, or it is closed */
} command = {.input = -1, .output = -1, .error = -1};

static struct {
    uint8_t data[STDIN_WINDOW_BYTES];
    size_t size;
    bool ended;
    uint32_t taken; /* not yet told to the host */
} input;

static struct {
    uint8_t data[HEADER_BYTES + 32768];
    size_t start, end;
    bool seen_host;
} outgoing;

static struct {
    uint8_t data[HEADER_BYTES + MAX_FRAME_BYTES];
    size_t size;
} incoming;

/* ---- the command */

static char **argument_vector(void) {
    int count = config_count("argv");
    char **argv = calloc((size_t)count + 1, sizeof *argv);
    for (int i = 0; argv && i < count; i++)
        argv[i] = config("argv", i);
    return argv;
}

static void __attribute__((noreturn)) become_command(int in, int out, int err) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    if (chroot("/new") || chdir("/"))
        _exit(126);
    if (in < 0) {
        in = open("/dev/null", O_RDONLY);
        out = err = open("/dev/console", O_RDWR | O_NOCTTY);
    }
    dup2(in, 0);
    dup2(out, 1);
    dup2(err, 2);
    if (in > 2)
        close(in);
    if (out > 2)
        close(out);
    if (command.terminal)
        ioctl(0, TIOCSCTTY, 0);
    clearenv();
    setenv("PATH", DEFAULT_PATH, 1);
    setenv("HOME", "/root", 1);
    if (command.terminal)
        setenv("TERM", "xterm", 1);
    for (int i = 0; config("env", i); i++)
        putenv(config("env", i));
    char **argv = argument_vector();
    execvp(argv[0], argv);
    fprintf(stderr, "triarch: cannot run '%s': %s\n", argv[0], strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}

static void fork_command(int in, int out, int err) {
    command.pid = fork();
    if (command.pid < 0)
        give_up("cannot start the command: %m");
    if (command.pid == 0)
        become_command(in, out, err);
    if (in >= 0)
        close(in);
    if (out >= 0 && out != in)
        close(out);
    if (err >= 0 && err != out)
        close(err);
}

static void resize(unsigned columns, unsigned rows) {
    struct winsize size = {.ws_col = (unsigned short)columns, .ws_row = (unsigned short)rows};
    if (command.terminal && command.output >= 0)
        ioctl(command.output, TIOCSWINSZ, &size);
}

static void start_on_terminal(void) {
    int unlock = 0, master = open("/new/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock))
        give_up("cannot open a terminal: %m");
    command.terminal = true;
    command.output = master;
    command.input = fcntl(master, F_DUPFD_CLOEXEC, 0);
    resize((unsigned)atoi(config("columns", 0)), (unsigned)atoi(config("rows", 0) ?: "24"));
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY);
    fork_command(slave, slave, slave);
}

static void start_on_pipes(void) {
    int in[2], out[2], err[2];
    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
        give_up("cannot make pipes: %m");
    command.input = in[1];
    command.output = out[0];
    command.error = err[0];
    fork_command(in[0], out[1], err[1]);
}

/* Output that only the host's log sees: no carriage returns. */
static void start_on_console(void) {
    struct termios mode;
    int console = open("/new/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (console >= 0 && !tcgetattr(console, &mode)) {
        mode.c_oflag &= (tcflag_t)~OPOST;
        tcsetattr(console, TCSANOW, &mode);
    }
    fork_command(-1, -1, -1);
    close(console);
}

/* ---- from the host. Each step returns whether it moved anything; when none does, PID 1 sleeps. */

static bool feed_command(void) {
    if (command.input < 0 || (!input.size && !input.ended))
        return false;
    ssize_t done = input.size ? write(command.input, input.data, input.size) : 0;
    if (done < 0 && errno == EAGAIN)
        return false;
    if (done < 0) /* the command closed its input: swallow the rest */
        done = (ssize_t)input.size;
    input.size -= (size_t)done;
    memmove(input.data, input.data + done, input.size);
    input.taken += (uint32_t)done;
    if (input.ended && !input.size) {
        if (command.terminal && write(command.input, END_OF_TRANSMISSION, 1) < 0)
            errno = 0; /* nobody reads: then nobody waits for the end either */
        close(command.input);
        command.input = -1;
    }
    return true;
}

static void obey(uint8_t type, const uint8_t *payload, size_t size) {
    if (type == FRAME_STOP && !command.ended)
        kill(command.pid, SIGTERM);
    else if (type == FRAME_ADAPT && size == 4)
        adapt(get_u32(payload));
    else if (type == FRAME_RESIZE && size == 4)
        resize((unsigned)(payload[0] << 8 | payload[1]), (unsigned)(payload[2] << 8 | payload[3]));
    else if (type == FRAME_END_OF_INPUT)
        input.ended = true;
    else if (type == FRAME_STDIN && size <= sizeof input.data - input.size) {
        if (command.input < 0) {
            input.taken += (uint32_t)size;
            return;
        }
        memcpy(input.data + input.size, payload, size);
        input.size += size;
    }
}

static bool read_host(void) {
    ssize_t got = read(control_port, incoming.data + incoming.size, sizeof incoming.data - incoming.size);
    if (got <= 0) {
        if (got == 0)
            incoming.size = 0; /* a frame never straddles two clients */
        return false;
    }
    incoming.size += (size_t)got;
    size_t at = 0;
    while (incoming.size - at >= HEADER_BYTES) {
        size_t size = get_u32(incoming.data + at + 1);
        if (size > MAX_FRAME_BYTES)
            give_up("the host sent a frame of %zu bytes", size);
        if (incoming.size - at - HEADER_BYTES < size)
            break;
        obey(incoming.data[at], incoming.data + at + HEADER_BYTES, size);
        at += HEADER_BYTES + size;
    }
    incoming.size -= at;
    memmove(incoming.data, incoming.data + at, incoming.size);
    return true;
}

/* ---- to the host */

static bool host_is_there(void) {
    struct pollfd state = {.fd = control_port, .events = POLLOUT};
    return poll(&state, 1, 0) <= 0 || !(state.revents & POLLHUP);
}

static bool flush_outgoing(void) {
    if (outgoing.start == outgoing.end)
        return false;
    ssize_t done = write(control_port, outgoing.data + outgoing.start, outgoing.end - outgoing.start);
    if (done > 0) {
        outgoing.seen_host = true;
        outgoing.start += (size_t)done;
    } else if (outgoing.seen_host && !host_is_there()) {
        outgoing.start = outgoing.end; /* a client that went away must not hold the command up */
    } else {
        return false;
    }
    return true;
}

static bool tell_credit(void) {
    if (!input.taken || outgoing.start != outgoing.end)
        return false;
    put_header(outgoing.data, FRAME_CREDIT, 4);
    put_u32(outgoing.data + HEADER_BYTES, input.taken);
    outgoing.start = 0;
    outgoing.end = HEADER_BYTES + 4;
    input.taken = 0;
    return true;
}

static bool take_output(int *from, uint8_t type) {
    if (*from < 0 || outgoing.start != outgoing.end)
        return false;
    ssize_t got = read(*from, outgoing.data + HEADER_BYTES, sizeof outgoing.data - HEADER_BYTES);
    if (got < 0 && errno == EAGAIN)
        return false;
    if (got <= 0) { /* a terminal that all have closed reads as an error */
        close(*from);
        *from = -1;
        return true;
    }
    put_header(outgoing.data, type, (uint32_t)got);
    outgoing.start = 0;
    outgoing.end = HEADER_BYTES + (size_t)got;
    return true;
}

static void move_all(void) {
    bool moved = true;
    while (moved) {
        moved = flush_outgoing();
        moved |= tell_credit();
        moved |= take_output(&command.output, FRAME_STDOUT);
        moved |= take_output(&command.error, FRAME_STDERR);
        moved |= read_host();
        moved |= feed_command();
    }
}

/* ---- the end */

static void reap(int signals) {
    char drained[256];
    int status;
    pid_t pid;
    while (read(signals, drained, sizeof drained) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == command.pid) {
            command.ended = true;
            command.status = status;
        }
}

static void __attribute__((noreturn)) put_away(int epoll) {
    uint8_t payload[100];
    struct epoll_event event;
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    do
        move_all();
    while ((command.output >= 0 || command.error >= 0 || outgoing.start != outgoing.end) && host_is_there() &&
           epoll_wait(epoll, &event, 1, LAST_WORDS_MS) > 0);
    if (!unmount_tree("/new"))
        say("cannot unmount the machine's root: %m");
    bool killed = WIFSIGNALED(command.status);
    put_u32(payload, (uint32_t)(killed ? 128 + WTERMSIG(command.status) : WEXITSTATUS(command.status)));
    int size = killed ? sprintf((char *)payload + 4, "killed by signal %d", WTERMSIG(command.status)) : 0;
    report(FRAME_EXIT, payload, 4 + (size_t)size);
    power_off();
}

static void watch_command(int epoll) {
    int ends[] = {command.input, command.output, command.error};
    for (int i = 0; i < 3; i++)
        if (ends[i] >= 0) {
            fcntl(ends[i], F_SETFL, O_NONBLOCK);
            watch(epoll, ends[i], (i ? EPOLLIN : EPOLLOUT) | EPOLLET);
        }
}

void run_app(void) {
    int epoll = epoll_create1(EPOLL_CLOEXEC), signals = signal_descriptor();
    signal(SIGPIPE, SIG_IGN);
    report(FRAME_READY, "", 0);
    if (config("columns", 0))
        start_on_terminal();
    else if (config("attached", 0))
        start_on_pipes();
    else
        start_on_console();
    watch(epoll, signals, EPOLLIN | EPOLLET);
    watch(epoll, control_port, EPOLLIN | EPOLLOUT | EPOLLET);
    watch_command(epoll);
    for (;;) {
        struct epoll_event event;
        move_all();
        reap(signals);
        if (command.ended)
            put_away(epoll);
        epoll_wait(epoll, &event, 1, -1);
    }
}
