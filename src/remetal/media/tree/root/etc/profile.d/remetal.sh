PS1='recovery:\w# '
export PS1 LESS=-R
