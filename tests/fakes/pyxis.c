/* A stand-in for pyxis, Slurm's plugin for containers: srun takes its flags, the task starts on the host and is told of
 * them in FAKE_PYXIS_IMAGE and FAKE_PYXIS_MOUNTS. Declares what it needs of <slurm/spank.h>, so that no header has to be
 * installed: `cc -shared -fPIC -DSLURM_VERSION=… -o pyxis.so pyxis.c`. */
#include <string.h>

typedef struct spank_handle *spank_t;
struct spank_option {
    char *name, *arginfo, *usage;
    int has_arg, val;
    int (*callback)(int val, const char *value, int remote);
};
extern int spank_option_register(spank_t spank, struct spank_option *option);
extern int spank_setenv(spank_t spank, const char *name, const char *value, int overwrite);

const char plugin_name[] = "fake_pyxis";
const char plugin_type[] = "spank";
const unsigned int plugin_version = SLURM_VERSION;
const unsigned int spank_plugin_version = 1;

static char values[2][4096]; /* copies: the value is Slurm's, and gone when the task starts */

static int take(int val, const char *value, int remote) {
    strncpy(values[val], value, sizeof values[val] - 1);
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image of the task's container", 1, 0, take},
    {"container-mounts", "MOUNTS", "what is mounted into it", 1, 1, take},
};

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (spank_option_register(spank, &options[i]) != 0)
            return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    if (values[0][0])
        spank_setenv(spank, "FAKE_PYXIS_IMAGE", values[0], 1);
    if (values[1][0])
        spank_setenv(spank, "FAKE_PYXIS_MOUNTS", values[1], 1);
    return 0;
}
