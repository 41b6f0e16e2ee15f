"""The machine underneath: processes, disks, mounts, loop devices, locks. The only room that starts a process."""
