/* The file server as a program of its own: in containers and in the trees of stopped machines. */
#include "files.h"

int main(void) {
    serve_files(0, 1);
}
